"""Newton-Schulz: singular values land in the published ranges, rotations pass through, shapes and batches do not matter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.flop_counter import FlopCounterMode

import training.optim.newton_schulz
from training.optim.muon import Muon
from training.optim.newton_schulz import (
    COEFFICIENTS,
    Coefficients,
    Form,
    gram_saves,
    newton_schulz,
    newton_schulz_flops,
)
from training.optim.routed import AdamSettings
from training.optim.routing import Route

NAMES: tuple[Coefficients, ...] = ("jordan", "polar_express")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float64."""
    return torch.linalg.qr(gaussian(size, size, seed=seed))[0]


def exact(matrices: Tensor, coefficients: Coefficients = "jordan") -> Tensor:
    """Newton-Schulz in float64."""
    return newton_schulz(matrices, coefficients=coefficients, dtype=torch.float64)


@pytest.mark.parametrize(
    ("coefficients", "smallest", "low", "high"),
    [
        ("jordan", 1e-2, 0.68, 1.13),
        ("jordan", 1e-3, 0.47, 1.20),
        ("polar_express", 1e-2, 0.86, 1.14),
        ("polar_express", 1e-3, 0.85, 1.14),
    ],
)
def test_singular_values_end_in_the_published_range(
    coefficients: Coefficients, smallest: float, low: float, high: float
) -> None:
    """diag(s, sqrt(1 - s^2)) has Frobenius norm 1, so its output shows the scalar map at s. The sheet rounds to two digits."""
    relative = torch.logspace(math.log10(smallest), -1e-6, 20_000, dtype=torch.float64)
    inputs = torch.diag_embed(torch.stack([relative, (1 - relative**2).sqrt()], dim=1))
    found = exact(inputs, coefficients)[:, 0, 0]
    assert low - 0.006 <= found.min() <= low + 0.02
    assert high - 0.02 <= found.max() <= high + 0.006


@pytest.mark.parametrize(
    ("coefficients", "columns", "rms"),
    [
        ("jordan", 256, 0.905),
        ("jordan", 1024, 0.954),
        ("polar_express", 256, 1.011),
        ("polar_express", 1024, 1.020),
    ],
)
def test_update_has_the_measured_root_mean_square(coefficients: Coefficients, columns: int, rms: float) -> None:
    """RMS times sqrt(max(m, n)) on Gaussian matrices; 0.01 is the spread over draws and sizes."""
    update = exact(gaussian(2, 256, columns), coefficients)
    assert float(update.square().mean().sqrt()) * math.sqrt(columns) == pytest.approx(rms, abs=0.01)


@pytest.mark.parametrize("coefficients", NAMES)
@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (7, 19), (19, 7), (1, 5)])
def test_rotations_of_either_side_pass_through(coefficients: Coefficients, rows: int, columns: int) -> None:
    """Odd matrix polynomials commute with rotations; 1e-10 leaves room for five float64 iterations that amplify by 8 each."""
    x, left, right = gaussian(1, rows, columns), rotation(rows, 1), rotation(columns, 2)
    assert torch.allclose(exact(left @ x @ right, coefficients), left @ exact(x, coefficients) @ right, atol=1e-10)


@pytest.mark.parametrize("coefficients", NAMES)
def test_the_factor_keeps_the_singular_vectors(coefficients: Coefficients) -> None:
    x = gaussian(1, 6, 9)
    left, _, right = torch.linalg.svd(x[0], full_matrices=False)
    inner = left.T @ exact(x, coefficients)[0] @ right.T
    assert torch.allclose(inner, torch.diag(torch.diagonal(inner)), atol=1e-10)
    assert bool((torch.diagonal(inner) > 0).all())


@pytest.mark.parametrize("coefficients", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_zero_stays_zero_also_beside_others(coefficients: Coefficients, dtype: torch.dtype) -> None:
    stack = torch.stack([torch.zeros(4, 6), gaussian(4, 6).float()])
    found = newton_schulz(stack, coefficients=coefficients, dtype=dtype)
    assert torch.equal(found[0], torch.zeros(4, 6))
    assert float(found[1].norm()) > 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tall_is_wide_transposed(dtype: torch.dtype) -> None:
    x = gaussian(3, 5, 11)
    assert torch.equal(newton_schulz(x.mT, dtype=dtype), newton_schulz(x, dtype=dtype).mT)


def test_a_batch_is_one_matrix_at_a_time() -> None:
    """Each matrix has its own norm; batched products may sum in another order, hence not bit-equal."""
    stack = gaussian(4, 8, 13) * torch.tensor([1e-3, 1.0, 50.0, 1e4], dtype=torch.float64)[:, None, None]
    singly = torch.cat([exact(matrix[None]) for matrix in stack])
    assert torch.allclose(exact(stack), singly, atol=1e-12)


def test_gradients_beyond_half_precision_are_normalised_before_the_cast() -> None:
    """Entries of 1e6 are infinite in float16 and entries of 1e-9 vanish there; their directions must not."""
    x = gaussian(1, 16, 24).float()
    usual = newton_schulz(x, dtype=torch.float16)
    for scale in (1e6, 1e-5):
        found = newton_schulz(x * scale, dtype=torch.float16)
        assert bool(torch.isfinite(found).all())
        assert torch.allclose(found, usual, atol=0.02)  # float16 rounds to 1e-3 and the iterations amplify that


def test_scale_of_the_input_does_not_matter_in_exact_arithmetic() -> None:
    """Up to the epsilon of 1e-8 in the norm."""
    x = gaussian(1, 10, 10)
    assert torch.allclose(exact(x * 1e3), exact(x), atol=1e-6)


def test_result_keeps_the_dtype_and_input_is_untouched() -> None:
    x = gaussian(2, 3, 4).float()
    before = x.clone()
    assert newton_schulz(x).dtype == torch.float32
    assert torch.equal(x, before)


def test_later_steps_reuse_the_last_coefficients() -> None:
    x = gaussian(1, 5, 5)
    assert len(COEFFICIENTS["polar_express"]) == 5
    assert bool(torch.isfinite(newton_schulz(x, steps=8, coefficients="polar_express", dtype=torch.float64)).all())


@pytest.mark.parametrize("coefficients", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 12, 12), (2, 8, 13), (3, 16, 64), (2, 64, 16), (1, 1, 9), (2, 48, 200)]
)
def test_gram_form_is_the_standard_form(
    coefficients: Coefficients, steps: int, count: int, rows: int, columns: int
) -> None:
    """Same polynomial, other grouping; 3e-10 is the published float64 bound, also with singular values from 1 to 1e-5."""
    x = gaussian(count, rows, columns)
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    steep = (left * torch.logspace(0, -5, values.shape[1], dtype=torch.float64)) @ right
    stack = torch.cat([x, steep, torch.zeros_like(x)])
    standard = newton_schulz(stack, steps, coefficients, torch.float64)
    gram = newton_schulz(stack, steps, coefficients, torch.float64, "gram")
    assert float((gram - standard).abs().max()) < 3e-10
    assert torch.equal(gram[-count:], torch.zeros_like(x))


@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (12, 18), (18, 12)])
def test_gram_form_leaves_shapes_alone_where_it_saves_nothing(rows: int, columns: int) -> None:
    x = gaussian(2, rows, columns)
    assert not gram_saves(rows, columns, 5)
    assert torch.equal(newton_schulz(x), newton_schulz(x, form="gram"))


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (16, 24), (16, 25), (25, 16), (16, 100)])
@pytest.mark.parametrize("steps", [1, 2, 5, 6])
def test_flops_are_those_that_torch_counts(form: Form, rows: int, columns: int, steps: int) -> None:
    with FlopCounterMode(display=False) as counter:
        newton_schulz(gaussian(3, rows, columns), steps, dtype=torch.float64, form=form)
    assert counter.get_total_flops() == 3 * newton_schulz_flops(rows, columns, steps, form)


def test_gram_form_never_costs_more_and_breaks_even_at_one_and_a_half() -> None:
    for columns in range(2, 64):
        standard, gram = newton_schulz_flops(16, columns), newton_schulz_flops(16, columns, form="gram")
        assert (gram < standard) == gram_saves(16, columns, 5)
        assert gram <= standard
    assert 20 * 2**2 * 3 + 10 * 2**3 == 8 * 2**2 * 3 + 28 * 2**3  # m = 2, n = 3


@pytest.mark.parametrize("coefficients", NAMES)
def test_the_restart_is_what_keeps_the_gram_form_sound_in_low_precision(
    coefficients: Coefficients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Singular values from 1 to 1e-5, as gradients have: bfloat16 errors are 0.12 to 0.18 by the standard form, at most twice that by
    the Gram form, and above 1 without the restart, for tiny negative eigenvalues of R run away.
    """
    left, _, right = torch.linalg.svd(gaussian(2, 64, 128), full_matrices=False)
    x = (left * torch.logspace(0, -5, 64, dtype=torch.float64)) @ right
    wanted = exact(x, coefficients)

    def error(form: Form) -> float:
        return float((newton_schulz(x, coefficients=coefficients, form=form) - wanted).norm() / wanted.norm())

    assert error("gram") < 2 * error("standard") < 0.5
    monkeypatch.setattr(training.optim.newton_schulz, "RESTART_AFTER", 99)
    assert error("gram") > 1.0


def test_muon_takes_the_gram_form_by_option() -> None:
    """One step of Muon in float64, matrices of two shapes; the forms agree and the option is really used."""
    found = {}
    for form in ("standard", "gram"):
        parameters = [Parameter(gaussian(6, 40, seed=1)), Parameter(gaussian(6, 6, seed=2))]
        routes = [
            Route(f"p{i}", p, tuple(p.shape), "matrix", "muon", True, (1, *p.shape)) for i, p in enumerate(parameters)
        ]
        optimizer = Muon(routes, 1e-2, 0.1, AdamSettings(1e-2, 0.1), ns_dtype="fp64", ns_form=form)
        for parameter in parameters:
            parameter.grad = gaussian(*parameter.shape, seed=3)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        shapes = [tuple(p.shape) for p in parameters]
        assert counter.get_total_flops() == sum(newton_schulz_flops(m, n, 5, form) for m, n in shapes)
        found[form] = [p.detach() for p in parameters]
    for standard, gram in zip(found["standard"], found["gram"], strict=True):
        assert torch.allclose(standard, gram, atol=3e-12)
