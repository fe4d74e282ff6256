"""Part 6: outliers after a few hundred steps: OSP and its Adam baseline, same data, same steps, one seed each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from analysis.probes.kurtosis import Kurtosis
from benchmarks.gpu_corpus import Corpus, corpus
from benchmarks.gpu_models import Network, Trained, shaped, trained
from benchmarks.gpu_part import Cell, Found, Part
from configs.schema import RunConfig
from training.build import build_model, build_schedule
from training.data.samplers import Shuffled
from training.objectives.next_token import NextToken

NETWORKS: tuple[Network, ...] = ("adam", "osp")
FEWEST_STEPS, MOST_STEPS = 200, 2000
RESERVED_SECONDS = 15.0  # building, evaluation, probe
UNTIMED_STEPS, TIMED_STEPS = 3, 8

SHAPE = ("model.layers=12", "model.width=512", "model.heads=8", "model.ffn_width=1408", "model.context=512")
TRAINING = ("optim.lr=3e-3", "optim.warmup=20", "train.global_batch=64", "train.micro_batch=64")
SIZE = {"max_tokens": 12_000_000, "held_out_rows": 64}
TINY_SHAPE = ("model.layers=2", "model.width=64", "model.heads=4", "model.ffn_width=192", "model.context=64")
TINY_TRAINING = ("optim.lr=3e-3", "optim.warmup=2", "train.global_batch=8", "train.micro_batch=8")
TINY_SIZE = {"max_tokens": 40_000, "held_out_rows": 8}
TINY_STEPS = 20


class KurtosisAfterTraining(Part):
    """Trains both networks in bf16 (eager: the probe's hooks need it) and measures kurtosis in context and held-out loss."""

    @cached_property
    def corpus(self) -> Corpus:
        """Read when the first cell needs it."""
        context = self.config("osp", 256, FEWEST_STEPS).model.context
        return corpus(context, tiny=self.bench.tiny, **(TINY_SIZE if self.bench.tiny else SIZE))

    def config(self, network: Network, vocab_size: int, steps: int) -> RunConfig:
        """The mid-size run: only optimizer, norm, embedding and clipping differ between the two."""
        sizes = (*TINY_SHAPE, *TINY_TRAINING) if self.bench.tiny else (*SHAPE, *TRAINING)
        return shaped(network, [*sizes, f"model.vocab_size={vocab_size}", f"train.steps={steps}"])

    def cells(self) -> Mapping[str, Cell]:
        """How many steps fit, then each network with that number."""
        return {"plan": self.plan, **{network: partial(self.train, network) for network in NETWORKS}}

    def run(self, config: RunConfig) -> Trained:
        """A new network on the device; weights by (seed, name)."""
        return trained(config, nn.Module.to(build_model(config), self.bench.device).train(), compiled=False)

    def tokens(self, config: RunConfig, step: int) -> Tensor:
        """Global batch `step`, `[B, T + 1]`."""
        sampler = Shuffled(len(self.corpus.train), config.run.seed)
        rows = self.corpus.train[torch.from_numpy(sampler.indices(step, config.train.global_batch))]
        return rows.to(self.bench.device)

    def step(self, run: Trained, config: RunConfig, number: int) -> Tensor:
        """One training step; returns the loss."""
        loss = run.forward_backward(self.tokens(config, number))
        run.update()
        return loss

    def steps(self, run: Trained, config: RunConfig, count: int) -> None:
        """The first `count` steps at the full learning rate."""
        for number in range(count):
            self.bench.check()
            self.step(run, config, number)

    def plan(self) -> Found:
        """Time a few steps of each network; both then train for as many steps as the time that is left allows, at least 200."""
        c = self.corpus
        seconds = {}
        for network in NETWORKS:
            config = self.config(network, c.vocab_size, FEWEST_STEPS)
            run = self.run(config)
            self.steps(run, config, UNTIMED_STEPS)
            seconds[network] = self.bench.timed(partial(self.steps, run, config, TIMED_STEPS)) / TIMED_STEPS
        fit = int((self.bench.remaining() - RESERVED_SECONDS) * 0.9 / sum(seconds.values()))
        return {
            "steps": TINY_STEPS if self.bench.tiny else max(FEWEST_STEPS, min(MOST_STEPS, fit)),
            "seconds_per_step": seconds,
            "corpus": c.kind,
            "corpus_seconds": c.seconds,
            "train_rows": len(c.train),
            "held_out_rows": len(c.held_out),
            "vocab_size": c.vocab_size,
        }

    def train(self, network: Network) -> Found:
        """Train, then measure."""
        steps = self.found["plan"]["steps"]
        config = self.config(network, self.corpus.vocab_size, steps)
        run, schedule, losses = self.run(config), build_schedule(config), []
        for number in range(steps):
            self.bench.check()
            run.optimizer.set_lr_factor(schedule(number))
            losses.append(self.step(run, config, number))
        curve = torch.stack(losses).tolist()
        every = max(1, steps // 20)
        found = {"steps": steps, "tokens": steps * config.train.global_batch * config.model.context}
        return found | self.measure(run, config) | {"loss_every": every, "losses": curve[::every]}

    @torch.no_grad()
    def measure(self, run: Trained, config: RunConfig) -> Found:
        """Held-out loss in nats per token and bits per byte, and the probe's numbers over all its sites."""
        run.model.eval()
        rows = self.corpus.held_out.to(self.bench.device)
        probe = Kurtosis(mode="context")
        nats = 0.0
        for part in rows.split(config.train.micro_batch):
            nats += float(NextToken()(run.model, {"tokens": part}).total) * len(part)
            probe.observe(run.model, part[:, :-1])
        loss = nats / len(rows)
        per_byte = loss / math.log(2) / self.corpus.bytes_per_token
        return {"held_out_loss": loss, "held_out_bits_per_byte": per_byte, "probe": probe.compute()}

    def conclude(self, cells: Mapping[str, Found]) -> Found:
        """One line per network."""
        lines = [
            f"{network:<5} {cell['steps']} steps: kurtosis of the residual stream {cell['probe']['kurtosis/resid']:.3f}, "
            f"largest peak/rms {cell['probe']['peak_to_rms/resid']:.1f}, held-out loss {cell['held_out_loss']:.4f}"
            for network in NETWORKS
            if (cell := cells[network])["status"] == "done"
        ]
        return {"note": "single runs of one seed", "summary": lines}
