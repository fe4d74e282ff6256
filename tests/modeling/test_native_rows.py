"""The C kernels give what torch gives in float64, for any number of threads; where they cannot be built, torch does the work."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from modeling import native_build
from modeling.native_build import compiled, library
from modeling.native_rows import code_dots, dots, largest_code, weighted_sum

ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


@pytest.fixture
def threads() -> Iterator[None]:
    """Threads as they were."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_the_kernels_are_compiled_here() -> None:
    """Without this the tests below would compare torch with itself."""
    assert library("native_rows") is not None


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 37, 64, 1000])
def test_products_of_rows_equal_those_in_float64_and_do_not_depend_on_threads(width: int, dtype: torch.dtype) -> None:
    matrix, x, index = random(90, width, dtype=dtype), random(width, dtype=dtype), torch.tensor([3, 89, 0, 41, 3])
    weights = random(5, dtype=dtype)
    wide = matrix.double()
    wanted = {
        "some": (dots(matrix, x, index), wide[index] @ x.double(), wide[index].abs() @ x.double().abs()),
        "all": (dots(matrix, x), wide @ x.double(), wide.abs() @ x.double().abs()),
        "sum": (
            weighted_sum(matrix, weights, index),
            weights.double() @ wide[index],
            weights.double().abs() @ wide[index].abs(),
        ),
    }
    for name, (found, exact, size) in wanted.items():
        assert found.dtype == dtype, name
        # Rounding of the result, and of the float32 sums of at most `width` terms.
        assert ((found.double() - exact).abs() <= ROUNDING[dtype] * exact.abs() + width * 2.0**-24 * size).all(), name
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(dots(matrix, x, index), wanted["some"][0])
        assert torch.equal(dots(matrix, x), wanted["all"][0])
        assert torch.equal(weighted_sum(matrix, weights, index), wanted["sum"][0])


def test_no_rows_give_nothing_and_zeros() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    assert dots(random(4, 8), random(8), nothing).shape == (0,)
    assert torch.equal(weighted_sum(random(4, 8), torch.empty(0), nothing), torch.zeros(8))


def test_rows_that_are_infinite_count_once() -> None:
    """Rows are read eight at a time: what fills up the last eight must not turn infinity into NaN."""
    matrix = torch.ones(4, 40)
    matrix[2] = torch.inf
    for index in (torch.tensor([2]), torch.tensor([1, 2, 3]), torch.tensor([0] * 8 + [2])):
        assert weighted_sum(matrix, torch.ones(len(index)), index).tolist() == [torch.inf] * 40


def test_torch_defaults_do_not_decide_what_the_kernels_write_to() -> None:
    matrix, x, index = random(20, 33), random(33), torch.tensor([5, 2, 19])
    codes, q = (100 * matrix).clamp(-127, 127).to(torch.int8), (1000 * x).to(torch.int16)

    def results() -> tuple[torch.Tensor, ...]:
        return dots(matrix, x), dots(matrix, x, index), weighted_sum(matrix, x[:3], index), code_dots(codes, q)

    wanted = results()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_vectors_of_another_length_are_refused_before_memory_is_read() -> None:
    with pytest.raises(ValueError, match=r"a vector \(7,\) for rows of a matrix \(4, 8\)"):
        dots(random(4, 8), random(7))
    with pytest.raises(ValueError, match=r"weights \(3,\) for rows \(2,\)"):
        weighted_sum(random(4, 8), random(3), torch.tensor([0, 1]))


@pytest.mark.parametrize("width", [1, 31, 256, 5000])
def test_products_of_codes_are_exact_up_to_the_largest(width: int) -> None:
    largest = largest_code(width)
    codes = torch.randint(-127, 128, (50, width), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    x = torch.randint(-largest, largest + 1, (width,), generator=torch.Generator().manual_seed(1), dtype=torch.int16)
    codes[0], x[:] = 127, torch.where(torch.arange(width) % 7 == 0, largest, x)
    assert torch.equal(code_dots(codes, x).double(), codes.double() @ x.double())
    x[:] = largest
    assert int(code_dots(codes, x)[0]) == 127 * largest * width < 2**31


def test_without_a_compiler_torch_does_the_work_and_one_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x, index = random(20, 33), random(33), torch.tensor([5, 2, 19])
    codes, q = (100 * matrix).clamp(-127, 127).to(torch.int8), (1000 * x).to(torch.int16)
    wanted = dots(matrix, x, index), weighted_sum(matrix, x[:3], index), code_dots(codes, q)
    monkeypatch.setenv("CC", "no-such-compiler")
    library.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"native_rows.c could not be compiled .*no-such-compiler.*CC"):
            assert library("native_rows") is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = dots(matrix, x, index), weighted_sum(matrix, x[:3], index), code_dots(codes, q)
    finally:
        library.cache_clear()
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)  # float32, other order of sums
    assert torch.equal(found[2], wanted[2])


def test_a_library_is_built_once_and_again_for_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }\n")
    first = compiled(source)
    stamp = first.stat().st_mtime_ns
    assert compiled(source) == first
    assert first.stat().st_mtime_ns == stamp
    source.write_text("int one(void) { return 2; }\n")
    assert compiled(source) != first
    assert sorted(tmp_path.glob("cache/mesokurt/*")) == sorted([first, compiled(source)])  # nothing half-made


def test_a_compiler_without_openmp_or_native_still_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "plain-cc"
    plain.write_text(
        '#!/bin/sh\ncase "$*" in *-fopenmp*|*-march*) echo "unknown option" >&2; exit 1;; esac\nexec cc "$@"\n'
    )
    plain.chmod(0o755)
    monkeypatch.setenv("CC", str(plain))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert compiled(Path(native_build.__file__).with_name("native_rows.c")).exists()


def test_a_file_that_does_not_compile_says_what_the_compiler_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "bad.c"
    source.write_text("int one(void) { return }\n")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        compiled(source)
    assert "expected expression" in caught.value.stderr


@pytest.mark.parametrize("broken", ["no closing quote", "no UTF-8"])
def test_a_compiler_that_cannot_be_understood_is_one_warning(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "cc"
    foreign.write_bytes(b"#!/bin/sh\nprintf '\\350 error\\n' >&2\n[ $1 = --version ]\n")
    foreign.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", 'gcc "' if broken == "no closing quote" else str(foreign))
    library.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"native_rows.c could not be compiled \(.*(closing quotation| error)"):
            assert library("native_rows") is None
    finally:
        library.cache_clear()


@pytest.mark.parametrize("place", ["a file", "no home"])
def test_without_a_place_for_libraries_torch_does_the_work(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    if place == "a file":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(
            Path, "home", classmethod(lambda _: (_ for _ in ()).throw(RuntimeError("no home directory")))
        )
    library.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match=r"native_rows.c could not be compiled \(.*(Not a directory|no home directory)"
        ):
            assert library("native_rows") is None
    finally:
        library.cache_clear()


def test_an_exported_model_without_c_files_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library("no_such_kernel") is None
