"""Perplexity against a loop over tokens, a model whose loss is known, and its own two entries."""

import math

import numpy as np
import pytest
import torch

from configs.errors import UserError
from quant.perplexity import bits_per_byte, perplexity, perplexity_of_rows
from tests.quant.tiny import VOCAB, tiny_llama, tokens


def test_loss_is_the_mean_over_windows_of_the_mean_log_likelihood_token_by_token() -> None:
    model, stream = tiny_llama(), tokens(1, 40)[0]
    means = []
    for start in (0, 12, 24):
        window, nats = stream[start : start + 12], []
        for t in range(1, 12):
            with torch.no_grad():
                last = model(input_ids=window[None, :t]).logits[0, -1]
            nats.append(-last.log_softmax(-1)[window[t]].item())
        means.append(sum(nats) / 11)
    seen = perplexity(model, stream, window=12, batch_size=2)
    assert (seen.windows, seen.tokens) == (3, 33)
    # Ours takes the softmax in float32.
    assert seen.nats_per_token == pytest.approx(sum(means) / 3, rel=1e-6)
    assert seen.perplexity == pytest.approx(math.exp(sum(means) / 3), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity_of_rows(model, tokens(3, 9)).perplexity == pytest.approx(VOCAB, rel=1e-6)


def test_rows_are_windows_and_batches_do_not_matter() -> None:
    model, rows = tiny_llama(), tokens(7, 17)
    whole = perplexity_of_rows(model, rows, batch_size=7)
    for batch_size in (1, 2, 100):
        # Float32 logits of float64 models: batching moves only float64's last bits.
        seen = perplexity_of_rows(model, rows, batch_size)
        assert seen.nats_per_token == pytest.approx(whole.nats_per_token, rel=1e-7)
    assert perplexity(model, torch.cat([rows.flatten(), rows[0, :5]]), window=17, batch_size=7) == whole


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_numpy_rows_of_a_token_store_are_read_as_they_are(dtype: type[np.integer]) -> None:
    model, rows = tiny_llama(), tokens(3, 9)
    assert perplexity_of_rows(model, rows.numpy().astype(dtype)) == perplexity_of_rows(model, rows)


def test_modes_of_all_modules_come_back() -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    first, second = perplexity_of_rows(model, tokens(2, 9)), perplexity_of_rows(model, tokens(2, 9))
    assert first == second
    assert [module.training for module in model.modules()] == before


def test_a_hopeless_model_has_infinite_perplexity_and_no_crash() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity_of_rows(model, tokens(2, 9)).perplexity == math.inf


def test_nothing_to_predict_is_a_user_error() -> None:
    model = tiny_llama()
    with pytest.raises(UserError, match="hold no window of 50"):
        perplexity(model, tokens(1, 40)[0], window=50)
    with pytest.raises(UserError, match=r"held-out rows of shape \(3, 1\)"):
        perplexity_of_rows(model, tokens(3, 1))


def test_bits_per_byte_of_uniform_bytes_is_eight() -> None:
    assert bits_per_byte(math.log(256), tokens=10, num_bytes=10) == pytest.approx(8)
    assert bits_per_byte(2 * math.log(256), tokens=5, num_bytes=10) == pytest.approx(8)
