"""Loading: inheritance, overrides, numbers, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.utils import set_seed

from configs.errors import ConfigError
from configs.loading import differences, dump_config, load_config
from configs.schema import HookSpec


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | str, *overrides: str) -> str:
    """The one line that loading fails with."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert caught.value.exit_code == 2
    return text


def test_an_empty_file_is_the_default_config(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "empty.yaml", "# nothing\n"))
    assert config.model.norm == HookSpec(name="ssnorm")
    assert config.model.resolved_kv_heads == config.model.heads
    assert config.model.resolved_ffn_width == 384  # ceil(8 * 128 / 3 / 128) * 128


def test_a_variant_states_only_what_differs(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "model: {width: 64, heads: 2}\nprobes: [kurtosis]\ntrain: {steps: 7}\n")
    write(tmp_path, "sub/middle.yaml", "extends: ../base.yaml\nmodel: {heads: 4}\n")
    leaf = write(tmp_path, "sub/leaf.yaml", "extends: middle\nprobes: []\noptim: {lr: 1}\n")
    config = load_config(leaf)
    assert (config.model.width, config.model.heads, config.train.steps, config.optim.lr) == (64, 4, 7, 1.0)
    assert config.probes == []


def test_a_hook_of_another_name_takes_no_options_from_its_parent(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "optim: {schedule: {name: wsd, decay_fraction: 0.5, final: 0.1}}\n")
    same = load_config(write(tmp_path, "same.yaml", "extends: base\noptim: {schedule: {name: wsd, final: 0.2}}\n"))
    assert same.optim.schedule.options == {"decay_fraction": 0.5, "final": 0.2}
    other = load_config(write(tmp_path, "other.yaml", "extends: base\noptim: {schedule: {name: cosine}}\n"))
    assert other.optim.schedule == HookSpec(name="cosine")
    short = load_config(write(tmp_path, "short.yaml", "extends: base\noptim: {schedule: constant}\n"))
    assert short.optim.schedule == HookSpec(name="constant")


def test_a_config_that_extends_itself_is_told_the_way(tmp_path: Path) -> None:
    a = write(tmp_path, "a.yaml", "extends: b\n")
    write(tmp_path, "b.yaml", "extends: c\n")
    write(tmp_path, "c.yaml", "extends: a\n")
    text = refusal(a)
    assert "extends itself through" in text
    assert all(name in text for name in ("a.yaml", "b.yaml", "c.yaml"))
    assert "extends itself" in refusal(write(tmp_path, "own.yaml", "extends: own.yaml\n"))


def test_missing_files_are_named_with_near_ones(tmp_path: Path) -> None:
    assert "quickstrat: no such config file; known names: quickstart" in refusal("quickstrat")
    assert "osp-1.4: no such config file; known names: osp-1.4b" in refusal(
        write(tmp_path, "x.yaml", "extends: osp-1.4\n")
    )
    assert "no such config file" in refusal(tmp_path / "absent.yaml")
    assert "no such config file" in refusal("n" * 5000)
    assert "no such config file" in refusal("a\0b")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1, 2]\n", "a config is a mapping of sections, not list"),
        ("just text\n", "a config is a mapping of sections, not str"),
        ("model: {width: 64\n", "not valid YAML"),
        ("model: {width: 64}\nmodel: {heads: 2}\n", "key 'model' is given twice"),
        ("model: {width: 64, width: 32}\n", "key 'width' is given twice"),
        ("1: 2\n", "key 1 is not text"),
        ("? [a]\n: b\n", "is not text"),
        ("model: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ('train: {steps: !!int ""}\n', "not valid YAML"),
        ("train: {steps: !!bool maybe}\n", "not valid YAML"),
        ("train: {steps: !!timestamp soon}\n", "not valid YAML"),
        ("a: &a [*a]\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("extends: [a, b]\n", "extends: must name one config"),
        ("extends: ''\n", "no such config file"),
    ],
)
def test_what_is_not_a_config_is_refused(text: str, told: str, tmp_path: Path) -> None:
    path = write(tmp_path, "bad.yaml", text)
    found = refusal(path)
    assert told in found
    assert "bad.yaml" in found or "no such" in found


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"model: \xff\xfe\n")
    assert "bytes.yaml: cannot be read" in refusal(path)
    path.write_bytes(b"model: \x01\n")
    assert "not valid YAML" in refusal(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("modle: {}", "modle: unknown key; did you mean model?"),
        ("model: {widht: 64}", "model.widht: unknown key; did you mean width or ffn_width?"),
        ("optim: {adam: {beta: [0.9, 0.95]}}", "optim.adam.beta: unknown key; did you mean betas"),
        ("data: {sources: [{kind: text, pth: x, path: y}]}", "data.sources.0.pth: unknown key; did you mean path"),
        ("data: {tokenizer: {typ: bpe}}", "data.tokenizer.typ: unknown key; "),
        ("checkpoint: {zzz: 1}", "checkpoint.zzz: unknown key; known keys: every, keep"),
        ("zzz: 1", "zzz: unknown key; known keys: run, model, data, optim, train"),
    ],
)
def test_an_unknown_key_at_any_depth_names_the_near_ones(text: str, told: str, tmp_path: Path) -> None:
    assert told in refusal(write(tmp_path, "c.yaml", text + "\n"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {steps: '8'}", "train.steps: input should be a valid integer (got '8')"),
        ("train: {steps: 8.0}", "train.steps: input should be a valid integer (got 8.0)"),
        ("train: {steps: true}", "train.steps: input should be a valid integer"),
        ("run: {seed: 4294967296}", "run.seed: input should be less than 4294967296 (got 4294967296)"),
        ("run: {seed: -1}", "run.seed: input should be greater than or equal to 0"),
        ("train: {steps: 0}", "train.steps: input should be greater than 0 (got 0)"),
        ("train: {compile: 1}", "train.compile: input should be a valid boolean"),
        ("train: {dtype: fp8}", "train.dtype: input should be 'bf16' or 'fp32'"),
        ("train: 3", "train: "),
        ("optim: {lr: -1}", "optim.lr: input should be greater than 0"),
        ("optim: {lr: .inf}", "optim.lr: input should be a finite number"),
        ("optim: {lr: .nan}", "optim.lr: "),
        ("optim: {lr: fast}", "optim.lr: input should be a valid number (got 'fast')"),
        ("optim: {adam: {betas: [0.9]}}", "optim.adam.betas.1: "),
        ("optim: {adam: {betas: 0.9}}", "optim.adam.betas: "),
        ("model: {norm: 3}", "model.norm: a hook is a NAME or a mapping with a 'name'"),
        ("model: {norm: {eps: 3}}", "model.norm: a hook is a NAME or a mapping with a 'name'"),
        ("model: {norm: {name: ssnorm, x: !!binary aGk=}}", "model.norm: an option is text, a number, true"),
        ("optim: {options: {x: [{y: !!set {a}}]}}", "optim.options: an option is text, a number, true"),
        ("optim: {options: {x: .nan}}", "optim.options: an option is text, a number, true"),
        ("probes: kurtosis", "probes: input should be a valid list"),
        ("probes: [{name: kurtosis, every: often}]", "every"),
        ("eval: {bits: [4-4]}", "eval.bits.0: string should match pattern"),
        ("data: {sources: []}", "data.sources: list should have at least 1 item"),
        ("data: {sources: [{kind: text}]}", "data.sources.0: a source of kind 'text' needs a path"),
        ("data: {sources: [{kind: csv}]}", "data.sources.0.kind: input should be 'stdlib', 'text'"),
        ("data: {tokenizer: {kind: huggingface}}", "data.tokenizer: a huggingface tokenizer needs a path"),
        ("data: {held_out: 1.0}", "data.held_out: input should be less than 1"),
        ("parallel: {zero_stage: 4}", "parallel.zero_stage: input should be 0, 1, 2 or 3"),
        ("model: {width: 100, heads: 3}", "model: width 100 is not a multiple of heads 3"),
        ("model: {width: 20, heads: 4}", "model: head size 5 (width / heads) is odd"),
        ("model: {heads: 4, kv_heads: 3}", "model: heads 4 is not a multiple of kv_heads 3"),
        ("model: {tie_embeddings: true}", "model: tie_embeddings must be false with embedding emb_proj"),
        ("train: {global_batch: 8, micro_batch: 3}", "train.global_batch 8 is not a multiple of train.micro_batch 3"),
        ("train: {compile: true}\nparallel: {zero_stage: 3}", "train.compile does not work with parallel.zero_stage 3"),
    ],
)
def test_a_wrong_value_names_its_key_and_what_is_wanted(text: str, told: str, tmp_path: Path) -> None:
    found = refusal(write(tmp_path, "c.yaml", text + "\n"))
    assert told in found
    assert str(tmp_path / "c.yaml") in found


def test_a_value_of_any_size_is_told_in_one_short_line(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 20))
    assert len(refusal(write(tmp_path, "bomb.yaml", bomb + "train: {steps: *a19}\n"))) < 2000
    assert len(refusal(write(tmp_path, "long.yaml", f"train: {{steps: {'y' * 100_000}}}\n"))) < 500


@pytest.mark.parametrize("number", ["5e-4", "5E-4", "5.e-4", ".5e-3", "+5e-4", "0.0005", "5.0e-4"])
def test_every_spelling_of_a_number_is_a_number(number: str, tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "n.yaml", f"optim: {{lr: {number}}}\n")).optim.lr == 5e-4
    assert load_config("quickstart", [f"optim.lr={number}"]).optim.lr == 5e-4


@pytest.mark.parametrize("word", ["e-4", "5e", "1e5x", "5e-4 things", "-", "."])
def test_what_only_resembles_a_number_stays_text(word: str, tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "n.yaml", f"run: {{name: {word!r}}}\n")).run.name == word
    assert load_config("quickstart", [f"run.name='{word}'"]).run.name == word


def test_a_date_is_text(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "d.yaml", "run: {name: 2026-11-24}\n")).run.name == "2026-11-24"


def test_merge_keys_work(tmp_path: Path) -> None:
    text = "data:\n  sources:\n  - &one {kind: text, path: a, weight: 2}\n  - {<<: *one, path: b}\n"
    sources = load_config(write(tmp_path, "m.yaml", text)).data.sources
    assert [(s.path, s.weight) for s in sources] == [("a", 2.0), ("b", 2.0)]


def test_overrides_reach_every_depth() -> None:
    config = load_config(
        "quickstart",
        ["train.steps=3", "optim.adam.betas=[0.8, 0.9]", "model.norm=rmsnorm", "optim.schedule.final=0.1", "optim.warmup=0",
         "optim.options.momentum=0.9", "model.kv_heads=null", "probes=[]", "run.name=a=b", "model.activation={name: gelu}"],
    )  # fmt: skip
    assert (config.train.steps, config.optim.adam.betas, config.model.norm.name) == (3, (0.8, 0.9), "rmsnorm")
    assert config.optim.schedule == HookSpec(name="wsd", options={"decay_fraction": 0.3, "final": 0.1})
    assert config.optim.options == {"momentum": 0.9}
    assert (config.model.kv_heads, config.probes, config.run.name) == (None, [], "a=b")
    assert config.model.activation == HookSpec(name="gelu")


def test_a_hook_given_by_name_gains_options_by_override(tmp_path: Path) -> None:
    path = write(tmp_path, "h.yaml", "optim: {schedule: cosine}\n")
    schedule = load_config(path, ["optim.schedule.final=0.3"]).optim.schedule
    assert schedule == HookSpec(name="cosine", options={"final": 0.3})


def test_every_seed_that_the_check_accepts_seeds_a_run() -> None:
    set_seed(load_config("quickstart", [f"run.seed={2**32 - 1}"]).run.seed)


def test_the_last_override_wins() -> None:
    assert load_config("quickstart", ["train.steps=3", "optim.warmup=0", "train.steps=4"]).train.steps == 4


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.steps", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("train..steps=3", "write it as section.key=value"),
        (".=3", "write it as section.key=value"),
        ("train.steps.more=3", "steps is not a section"),
        ("run.dir.more=3", "run.dir: "),
        ("probes.0=kurtosis", "probes is not a section"),
        ("train.steps=[", "not valid YAML"),
        ("train.stepz=3", "train.stepz: unknown key; did you mean steps"),
        ("trian.steps=3", "trian: unknown key; did you mean train"),
        ("train=3", "train: "),
        ("model.norm.name=3", "model.norm: a hook is a NAME"),
    ],
)
def test_a_wrong_override_is_told(override: str, told: str) -> None:
    assert told in refusal("quickstart", override)


@pytest.mark.parametrize(
    ("name", "overrides", "folder"),
    [
        ("quickstart", [], "runs/quickstart"),
        ("ladder/160m", [], "runs/ladder/160m"),
        ("quickstart", ["train.steps=50", "model.norm=rmsnorm"], "runs/quickstart-model.norm=rmsnorm,train.steps=50"),
        ("quickstart", ["eval.rows=3", "train.micro_batch=2", "parallel.zero_stage=3"], "runs/quickstart"),
        ("quickstart", ["train.steps=50", "run.dir=here"], "here"),
    ],
)
def test_a_variant_gets_a_run_directory_of_its_own(name: str, overrides: list[str], folder: str) -> None:
    assert load_config(name, overrides).run.dir == folder


def test_long_overrides_give_a_short_folder_that_still_tells_them_apart() -> None:
    one, other = (
        load_config("quickstart", [f"run.name=x{n}", f"data.sources=[{{kind: text, path: {'a' * 200}{n}}}]"])
        for n in (1, 2)
    )
    assert one.run.dir != other.run.dir
    assert len(one.run.dir) < 40


@pytest.mark.parametrize("key", ["run.dir", "data.store", "data.tokenizer.path", "data.sources.0.path"])
def test_a_tilde_is_the_home_directory_in_every_path(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the saved config holds the whole path: another user may read it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    override = "data.sources=[{kind: text, path: ~/mine}]" if "sources" in key else f"{key}=~/mine"
    config = load_config("quickstart", [override])
    saved = yaml.safe_load(dump_config(config))
    for part in key.split("."):
        saved = saved[int(part)] if part.isdigit() else saved[part]
    assert saved == str(tmp_path / "mine")


def test_differences_name_the_dotted_keys_and_both_values() -> None:
    old, new = (
        load_config("quickstart"),
        load_config("quickstart", ["train.steps=600", "model.norm=rmsnorm", "probes=[]"]),
    )
    found = {key: (a, b) for key, a, b in differences(old, new)}
    assert found["train.steps"] == (500, 600)
    assert found["model.norm"] == ("ssnorm", "rmsnorm")
    assert set(found) == {"train.steps", "model.norm", "probes", "run.dir"}


def test_a_config_cannot_be_changed_after_validation() -> None:
    config = load_config("quickstart")
    with pytest.raises(Exception, match="frozen"):
        config.train.steps = 5


def test_saved_options_keep_their_types(tmp_path: Path) -> None:
    config = load_config("quickstart", ["optim.options={momentum: 0.9, nesterov: false, ns_steps: 6, ns_dtype: fp32}"])
    again = load_config(write(tmp_path, "s.yaml", dump_config(config)))
    assert again.optim.options == {"momentum": 0.9, "nesterov": False, "ns_steps": 6, "ns_dtype": "fp32"}
