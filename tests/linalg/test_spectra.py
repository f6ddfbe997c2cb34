"""Certified stable ranks equal those of a full float64 SVD, and the bounds hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medlore.errors import InputError, TargetError, UnknownNameError
from medlore.linalg import lanczos
from medlore.linalg.cholesky import GramMatrix, exact_enclosure
from medlore.linalg.lanczos import BlockKrylov, leading_space_bound, schatten8
from medlore.linalg.passes import chi_floor, exact_pass, frobenius_norm, gamma, gram_upper, gram_upper_64
from medlore.linalg.spectra import effective_rank, spectral_norm, stable_rank


def svd_stable_rank(W: np.ndarray) -> float:
    values = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    return float((values**2).sum() / values[0] ** 2)


def with_spectrum(values: np.ndarray, m: int, n: int, seed: int, dtype: type = np.float32) -> np.ndarray:
    g = np.random.default_rng(seed)
    k = len(values)
    U = np.linalg.qr(g.standard_normal((m, k)))[0]
    V = np.linalg.qr(g.standard_normal((n, k)))[0]
    return ((U * values) @ V.T).astype(dtype)


def spectrum(kind: str, k: int) -> np.ndarray:
    j = np.arange(1, k + 1.0)
    return {
        "p0.1": j**-0.1, "p0.3": j**-0.3, "p0.5": j**-0.5, "p1": 1 / j, "p3": j**-3.0,
        "cluster": np.where(j <= 20, 1 - 1e-7 * j, 0.9 / np.sqrt(j)),
        "doubles": np.repeat(j[: k // 2 + 1] ** -0.5, 2)[:k],
        "flat": np.ones(k),
        "rank-one": np.eye(1, k)[0],
        "spike": np.where(j == 1, 5.0, 1.0),
        "geometric": 0.7**j,
    }[kind]  # fmt: skip


KINDS = ["p0.1", "p0.3", "p0.5", "p1", "p3", "cluster", "doubles", "flat", "rank-one", "spike", "geometric"]


def official(seed: int, blocks: int, d: int, p: float) -> list[np.ndarray]:
    g = np.random.default_rng(seed)
    found = []
    for i in range(blocks):
        for rows in (3 * d, d):
            W = g.standard_normal((rows, d)).astype(np.float32)
            found.append(W * (np.arange(1, d + 1) ** (-p * (i + 1) / blocks)).astype(np.float32))
    return found


def test_golden_pairs_of_the_reference() -> None:
    found = [stable_rank(W) for W in official(0, 4, 64, 1.0)]
    assert [f.rank for f in found] == [13, 10, 5, 4, 2, 3, 2, 2]
    expected = [13.160229, 9.597282, 4.971125, 3.985264, 2.350675, 2.548885, 1.675035, 1.746146]
    assert [f.value for f in found] == pytest.approx(expected, abs=2e-6)


def test_golden_large_gaussian_and_merged_qkv() -> None:
    g = np.random.default_rng(42)
    for shape, value in [((2304, 768), 310.3365), ((768, 768), 195.3750)]:
        found = stable_rank(g.standard_normal(shape).astype(np.float32))
        assert found.rank == round(value)
        assert found.value == pytest.approx(value, abs=1e-4)
        assert found.lower <= value + 1e-4
        assert found.upper >= value - 1e-4
        assert found.decided_by == "cholesky"
    g = np.random.default_rng(7)
    decay = np.arange(1, 65.0)
    q, k, v = g.standard_normal((64, 64)) * decay**-0.2, 3 * g.standard_normal((64, 64)) * decay**-1, g.standard_normal((64, 64))
    assert [stable_rank(W).value for W in (np.vstack([q, k, v]), q, k, v)] == pytest.approx(
        [9.199159, 13.785503, 1.645787, 16.372492], abs=1e-6
    )


@pytest.mark.parametrize("proof", [False, True])
def test_closed_forms(proof: bool) -> None:
    assert stable_rank(np.eye(32), proof=proof).value == pytest.approx(32)
    assert stable_rank(torch.eye(300), proof=proof).rank == 300
    assert stable_rank(np.outer(np.arange(1, 400.0), np.ones(300)), proof=proof).rank == 1
    for factor in (1, 7.3):
        assert stable_rank(factor * np.diag([4.0, 3, 2, 1]), proof=proof).value == pytest.approx(1.875)
    assert stable_rank(np.ones((1, 5)), proof=proof).value == 1
    assert stable_rank(np.ones((5, 1)), proof=proof).rank == 1


@pytest.mark.parametrize("proof", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(200, 200), (600, 200), (180, 320)])
def test_equals_the_full_svd(kind: str, shape: tuple[int, int], proof: bool) -> None:
    W = with_spectrum(spectrum(kind, min(shape)), *shape, seed=len(kind))
    exact = svd_stable_rank(W)
    found = stable_rank(W, proof=proof)
    if kind not in ("flat", "rank-one"):  # there the float64 value itself is only rounding away from an integer bound
        assert found.lower * (1 - 1e-12) <= exact <= found.upper * (1 + 1e-12)
    assert found.rank == round(exact)
    assert found.lower <= found.value <= found.upper
    assert (found.failure_probability == 0) if proof else (found.failure_probability < 1e-12)
    if proof:
        assert found.decided_by in ("trace", "proof", "exact")
    else:
        assert found.decided_by != "proof"


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(160, 260),
    n=st.integers(160, 260),
    p=st.floats(0, 2),
    noise=st.floats(0, 0.05),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(0.1, 3),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    rounding=st.sampled_from(["half-even", "floor", "ceil", "half-up"]),
)
def test_random_matrices_equal_the_svd(m: int, n: int, p: float, noise: float, seed: int, scale: float, dtype: type, rounding: str) -> None:
    g = np.random.default_rng(seed)
    k = min(m, n)
    W = with_spectrum(np.arange(1, k + 1.0) ** -p, m, n, seed % 1000) + noise / math.sqrt(k) * g.standard_normal((m, n))
    W = (W / np.abs(W).max()).astype(dtype)
    exact = svd_stable_rank(W)
    rule = {"half-even": round, "floor": math.floor, "ceil": math.ceil, "half-up": lambda x: math.floor(x + 0.5)}[rounding]
    found = stable_rank(W, scale=scale, rounding=rounding, seed=seed)
    assert found.rank == max(1, min(k, rule(scale * exact)))
    assert found.lower * (1 - 1e-12) <= exact <= found.upper * (1 + 1e-12)


@pytest.mark.parametrize("proof", [False, True])
@pytest.mark.parametrize("edge", [2.5, 7.5, 40.5])
@pytest.mark.parametrize("distance", [1e-3, -1e-3, 1e-6, -1e-6, 1e-9, -1e-9])
def test_near_rounding_edges(edge: float, distance: float, proof: bool) -> None:
    target, n = edge + distance, 192
    tail = np.random.default_rng(3).uniform(0.5, 1, n - 1)
    ones = min(n - 1, math.ceil(2.2 * target))
    tail[ones:] = 1e-3
    tail *= math.sqrt((target - 1) / (tail**2).sum())
    assert tail.max() < 1
    W = with_spectrum(np.concatenate([[1], tail]), n, n, seed=5, dtype=np.float64)
    assert abs(svd_stable_rank(W) - target) < 1e-11
    found = stable_rank(W, proof=proof)
    assert found.rank == round(target) == round(svd_stable_rank(W))


def test_a_float32_weight_on_an_edge_is_computed_exactly() -> None:
    W = np.random.default_rng(1).standard_normal((256, 200)).astype(np.float32)
    exact = svd_stable_rank(W)
    for distance in (1e-8, 1e-9, -1e-9, -1e-10):
        wanted = math.floor(exact) + 0.5 + distance
        found = stable_rank(W, scale=wanted / exact)
        assert found.decided_by == "exact" or distance == -1e-9  # there the lower bound of σ₁ alone is enough
        assert found.rank == round(wanted)


def test_ties_follow_the_rounding_rule() -> None:
    W = np.diag([2.0, 2, 1, 1])  # stable rank 2.5, exactly
    assert [stable_rank(W, rounding=r).rank for r in ("half-even", "half-up", "floor", "ceil")] == [2, 3, 2, 3]
    assert stable_rank(W, scale=3).rank == 4  # clipped to the smaller side
    assert stable_rank(W, scale=0.01).rank == 1


@pytest.mark.parametrize("p", [0.3, 0.7])
def test_tolerance_narrows_the_bounds(p: float) -> None:
    W = with_spectrum(np.arange(1, 301.0) ** -p, 300, 300, seed=1)
    exact = svd_stable_rank(W)
    for tolerance in (1e-2, 1e-4, 1e-7):
        found = stable_rank(W, tolerance=tolerance)
        assert found.upper - found.lower <= tolerance * found.value
        assert found.lower <= exact <= found.upper


def test_dtype_and_layout_do_not_matter() -> None:
    W = torch.from_numpy(with_spectrum(np.arange(1, 201.0) ** -0.4, 320, 200, seed=2))
    for half in (torch.float16, torch.bfloat16):
        narrow = W.to(half)
        assert stable_rank(narrow).value == pytest.approx(svd_stable_rank(narrow.float().numpy()), rel=1e-5)
    exact = svd_stable_rank(W.numpy())
    strided = torch.zeros(640, 400)[::2, ::2].copy_(W)
    for same in (W, W.T, W.T.contiguous(), strided, W.numpy()[::-1], W * 1e-30, W * 1e30, W.double() * 1e-200, W.double() * 1e200):
        found = stable_rank(same)
        assert found.rank == round(exact)
        assert found.value == pytest.approx(exact, rel=1e-4)
    assert stable_rank(torch.nn.Parameter(W)).rank == round(exact)


def test_flat_tall_matrices_need_no_exact_computation() -> None:
    """The Ritz pair of the Gram matrix converges, so that only a rounding edge costs a full eigenvalue computation."""
    g = np.random.default_rng(0)
    for m, n in ((1536, 512), (700, 500), (512, 512)):
        W = g.standard_normal((m, n)).astype(np.float32)
        found = stable_rank(W)
        assert found.decided_by == "cholesky"
        assert found.steps < 80
        assert found.rank == round(svd_stable_rank(W))


def test_same_seed_same_answer() -> None:
    W = with_spectrum(np.arange(1, 301.0) ** -0.5, 300, 300, seed=1)
    before = W.copy()
    assert stable_rank(W, seed=3) == stable_rank(W, seed=3)
    assert np.array_equal(W, before)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.full((4, 4), np.nan), "weight: NaN or infinity"),
        (np.array([[1.0, np.inf]]), "weight: NaN or infinity"),
        (torch.full((300, 200), float("nan")), "weight: NaN or infinity"),
        (np.zeros((3, 3)), "weight: all zero"),
        (np.zeros((0, 3)), "weight: empty"),
        (np.zeros(3), "weight: 1 axes"),
        (torch.zeros(2, 2, 2, 2), "weight: 4 axes"),
    ],
)
def test_bad_weights_are_reported(weight: np.ndarray, message: str) -> None:
    for function in (stable_rank, effective_rank, spectral_norm):
        with pytest.raises(TargetError, match=message):
            function(weight)


def test_bad_options_are_reported() -> None:
    with pytest.raises(UnknownNameError, match="half-even"):
        stable_rank(np.eye(2), rounding="half-evn")  # type: ignore[arg-type]
    for scale in (0, -1, math.nan, math.inf):
        with pytest.raises(InputError, match="scale"):
            stable_rank(np.eye(2), scale=scale)
    with pytest.raises(InputError, match="tolerance"):
        stable_rank(np.eye(2), tolerance=0)


def test_other_measures() -> None:
    assert effective_rank(np.eye(5)) == pytest.approx(5)
    assert effective_rank(np.diag([1.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(np.diag([3.0, 1])) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    W = with_spectrum(3 * np.arange(1, 301.0) ** -0.5, 300, 300, seed=1)
    for proof in (False, True):
        norm = spectral_norm(W, tolerance=1e-5, proof=proof)
        sigma = float(np.linalg.svd(W.astype(np.float64), compute_uv=False)[0])
        assert norm.lower <= sigma <= norm.upper
        assert norm.upper - norm.lower <= 1e-5 * sigma


def test_the_start_is_unlucky_as_often_as_the_formula_says() -> None:
    """P[‖qᵀΩ‖ <= t] for the t of a failure probability that can be sampled."""
    g = np.random.default_rng(0)
    for b in (1, 4, 8):
        lengths = np.linalg.norm(g.standard_normal((200_000, b)), axis=1)
        assert (lengths <= chi_floor(b, 0.01)).mean() == pytest.approx(0.01, abs=0.001)


@pytest.mark.parametrize("kind", ["p0.3", "p0.5", "p1", "cluster", "doubles"])
def test_upper_bound_fails_no_more_often_than_stated(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a failure probability of 5 % the bound must hold in at least 95 % of the starts, and be of use."""
    monkeypatch.setattr(lanczos, "FAILURE_OF_START", 0.05)
    n, block, tries = 96, 2, 120
    values = spectrum(kind, n)
    A = with_spectrum(values, n, n, seed=4, dtype=np.float64)
    top, misses, finite = float(values[0] ** 2), 0, 0
    for seed in range(tries):
        krylov = BlockKrylov(A, block, 9, np.random.default_rng(seed))
        for _ in range(3 if kind == "p1" else 8):
            krylov.step()
        theta = krylov.solve()
        bound = krylov.upper_bound(1.5 * theta, residual=1e-13, slack=1e-13)
        finite += math.isfinite(bound)
        misses += bound < top * (1 - 1e-12)
    assert finite > tries / 2
    assert misses <= 0.05 * tries


def test_a_start_without_the_top_vector_is_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one event that the probability speaks of: with Ω orthogonal to q₁ the bound is wrong, so it is not vacuous."""
    n = 96
    A = np.diag(np.concatenate([[2.0], 0.1 ** np.arange(n - 1)]))

    class Blind:
        def standard_normal(self, size: tuple[int, int], dtype: type) -> np.ndarray:
            draw = np.random.default_rng(0).standard_normal(size, dtype)
            draw[:, 0] = 0
            return draw

    krylov = BlockKrylov(A, 4, 8, Blind())  # type: ignore[arg-type]
    for _ in range(2):
        krylov.step()
    theta = krylov.solve()
    assert theta == pytest.approx(1, rel=1e-3)
    assert krylov.upper_bound(1.5 * theta, residual=1e-13, slack=1e-13) < 4


def test_measured_residual_covers_the_true_one() -> None:
    A = with_spectrum(np.arange(1, 301.0) ** -0.4, 400, 300, seed=8)
    krylov = BlockKrylov(A, 16, 6, np.random.default_rng(0))
    for _ in range(4):
        krylov.step()
    theta, p, b = krylov.solve(), 64, 16
    rows = krylov._rows[: 5 * 16].astype(np.float64)
    V, G = rows[:p].T, A.astype(np.float64).T @ A.astype(np.float64)
    F = G @ V - V @ krylov._T[:p, :p]
    F[:, p - b :] -= rows[p : p + b].T @ krylov.next_factor
    seen: dict[str, float] = {}
    krylov.upper_bound = lambda target, **measured: seen.update(measured) or math.inf  # type: ignore[method-assign]
    enclosure = krylov.enclose(1.05 * theta)
    assert np.linalg.norm(F, 2) <= seen["residual"] < 1e-2
    top = float(np.linalg.eigvalsh(G)[-1])
    assert enclosure.lower <= top * (1 + 1e-13)
    assert enclosure.lower == pytest.approx(top, rel=1e-3)


@pytest.mark.parametrize("exact", [False, True])
def test_cholesky_never_passes_below_the_top(exact: bool) -> None:
    """A level below σ₁² is refused, or its bound comes out above σ₁²; one just above is accepted."""
    A = np.random.default_rng(6).standard_normal((500, 300)).astype(np.float32)
    top = float(np.linalg.svd(A.astype(np.float64), compute_uv=False)[0] ** 2)
    gram = GramMatrix(A, np.ones(300), exact=exact)
    assert gram.theta == pytest.approx(top, rel=1e-5)
    step = 1e-9 if exact else 1e-4
    for factor in (0.5, 0.99, 1 - 1e-6, 1 - 1e-9, 1, 1 + 1e-9, 1 + step, 1.01):
        rng = np.random.default_rng(0)
        seen = gram.proved_bound(factor * top) if exact else gram.probed_bound(factor * top, rng)
        if factor <= 0.99:
            assert seen is None
        if seen is not None:
            assert seen.lower <= top * (1 + 1e-14) <= seen.upper
        if factor >= 1 + step:
            assert seen is not None
            assert seen.upper <= factor * top * (1 + (1e-8 if exact else 1e-3))


def test_passes_are_exact_enough() -> None:
    g = np.random.default_rng(9)
    for A in (g.standard_normal((3000, 170)).astype(np.float32), np.asfortranarray(g.standard_normal((700, 333)))):
        X = g.standard_normal((A.shape[1], 3))
        seen, A64 = exact_pass(A, X), A.astype(np.float64)
        assert seen.frobenius2 == pytest.approx(float((A64**2).sum()), rel=1e-13)
        assert seen.images == pytest.approx(A64.T @ (A64 @ X), rel=1e-9)
        assert seen.lengths2 == pytest.approx(((A64 @ X) ** 2).sum(0), rel=1e-12)
        G = A64.T @ A64
        assert gram_upper_64(A) == pytest.approx(np.triu(G), rel=1e-9, abs=1e-9)
        assert np.triu(gram_upper(A)) == pytest.approx(np.triu(G), rel=1e-3, abs=1e-2)


def test_the_rounding_of_the_squares_is_bounded_for_wide_matrices_too() -> None:
    """16 rows are the least that a pass takes at a time: beyond 16,384 columns they hold more than 2¹⁸ entries."""
    A = np.full((40, 20_000), 0.1, np.float32)
    seen = exact_pass(A, np.ones((20_000, 1)))
    assert seen.frobenius_error >= gamma(16 * 20_000) > gamma(1 << 18)
    true = float(np.float64(np.float32(0.1))) ** 2 * A.size
    assert abs(seen.frobenius2 - true) <= seen.frobenius_error * true


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_a_norm_comes_with_its_error(scale: float) -> None:
    g = np.random.default_rng(2)
    values = g.standard_normal((300, 500)) * scale
    norm, error = frobenius_norm(values)
    assert error < 1e-10
    assert norm == pytest.approx(math.sqrt(math.fsum(float(v) ** 2 for v in (values / scale).ravel())) * scale, rel=1e-13)
    assert frobenius_norm(np.zeros((2, 3)))[0] == 0


def test_bounds_hold_the_rounding_of_the_trace() -> None:
    """Of a small matrix the sum of squares is the trace of a Gram matrix, which is rounded as well as σ₁²."""
    W = np.random.default_rng(4).standard_normal((150, 90))
    seen, found = exact_enclosure(W), stable_rank(W)
    assert found.decided_by == "exact"
    assert seen.frobenius_error == gamma(240)
    assert found.upper >= seen.frobenius2 * (1 + gamma(240)) / seen.lower
    assert found.lower <= seen.frobenius2 * (1 - gamma(240)) / seen.upper


def test_a_leading_space_proves_a_bound() -> None:
    A = with_spectrum(1 / np.arange(1, 301.0), 400, 300, seed=3)
    values, vectors = np.linalg.eigh(A.astype(np.float64).T @ A.astype(np.float64))
    top = float(values[-1])
    noisy = vectors[:, ::-1][:, :8] + 1e-4 * np.random.default_rng(0).standard_normal((300, 8))
    seen = leading_space_bound(A, noisy, 1.05 * top)
    assert seen is not None
    assert seen.failure_probability == 0
    assert seen.lower <= top * (1 + 1e-14) <= seen.upper
    for factor in (0.3, 0.9, 0.999, 1 - 1e-6):
        assert leading_space_bound(A, noisy, factor * top) is None
    found = stable_rank(A)
    assert found.decided_by == "trace"  # a proof, though none was asked for
    assert found.failure_probability == 0


@pytest.mark.parametrize("values", [[2, 1, 0.1, 0.1], [2, 2 - 1e-7, 2 - 2e-7, 0.1]])
def test_a_leading_space_that_misses_the_top_proves_nothing(values: list[float]) -> None:
    A = np.diag(np.array(values))
    eye = np.eye(4)
    for X in (eye[:, 1:], eye[:, 1:3], np.array([[1e-9, 1, 0, 0]]).T):  # orthogonal, or nearly, to the top vector
        second = values[1] ** 2
        for target in (second * (1 + 1e-9), 1.01 * second, 0.999999999 * values[0] ** 2):
            if target < values[0] ** 2:
                assert leading_space_bound(A, X, target) is None


def test_a_leading_space_of_mixed_vectors_proves_nothing_below_the_top() -> None:
    """Rotated vectors hold the whole trace without any coupling outwards: only what T has off its diagonal speaks."""
    A = np.diag([2.0, 1.0, 0.1, 0.1])
    mixed = np.array([[1.0, 1, 0, 0], [1, -1, 0, 0]]).T
    for target in (2.6, 3.0, 3.9, 3.999):
        assert leading_space_bound(A, mixed, target) is None


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_random_bound_does_not_depend_on_the_unit_of_the_weight(scale: float) -> None:
    A = with_spectrum(np.arange(1, 301.0) ** -0.4, 300, 300, seed=1)
    bounds = []
    for factor in (1.0, scale):
        krylov = BlockKrylov((factor * A).astype(np.float64), 16, 6, np.random.default_rng(0))
        for _ in range(4):
            krylov.step()
        theta = krylov.solve()
        bounds.append(krylov.upper_bound(1.05 * theta, residual=1e-9 * theta, slack=1e-13) / theta)
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-6)
    assert math.isfinite(bounds[0])


def test_schatten_norm_is_above_the_spectral_norm() -> None:
    N = np.random.default_rng(0).standard_normal((50, 16, 16)) * np.geomspace(1e-12, 1e12, 50)[:, None, None]
    spectral = np.linalg.norm(N, 2, axis=(1, 2))
    assert (schatten8(N) >= spectral).all()
    assert (schatten8(N) <= 16 ** (1 / 8) * spectral).all()


def adversaries() -> dict[str, np.ndarray]:
    n = 192
    edge = np.zeros((n + 8, n))
    edge[np.arange(4), np.arange(4)] = [2, 2, 1, 1]  # stable rank 2.5, exactly, and rows of zeros
    ties = np.diag(np.concatenate([[1.0, 1.0, 1.0], np.full(n - 3, math.sqrt(4.5 / (n - 3)))]))  # 7.5 up to one rounding
    clustered = with_spectrum(np.concatenate([1 - 1e-9 * np.arange(40), np.full(n - 40, 0.2)]), n, n, seed=1, dtype=np.float64)
    hidden = np.diag(np.concatenate([np.full(n - 1, 0.9), [1.0]]))
    return {
        "edge": edge,
        "ties": ties,
        "clustered": clustered,
        "hidden": hidden,
        "rank-one": np.outer(np.arange(1.0, n + 1), np.ones(n)),
        "nearly rank-one": np.outer(np.ones(n), np.ones(n)) + np.eye(n),
        "one entry": np.eye(n, n, n - 1),
        "identity": np.eye(n),
        "half": np.vstack([np.eye(n), np.zeros((n, n))]),
        "steep": with_spectrum(np.geomspace(1, 1e-12, n), n, n, seed=2, dtype=np.float64),
    }


@pytest.mark.parametrize("factor", [1.0, 2.0**-100, 2.0**100, 2.0**-23, 2.0**18])
@pytest.mark.parametrize("proof", [False, True])
def test_adversaries_equal_the_svd(proof: bool, factor: float) -> None:
    for name, W in adversaries().items():
        found = stable_rank(W * factor, proof=proof)
        assert found.rank == round(svd_stable_rank(W)), name
        narrow = (W * factor).astype(np.float32)
        exact = svd_stable_rank(narrow.astype(np.float64) / factor)
        if abs(exact % 1 - 0.5) > 1e-9:
            assert stable_rank(narrow, proof=proof).rank == round(exact), name


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(160, 240),
    p=st.floats(0, 1.5),
    room=st.sampled_from([1e-5, 1e-4, 1e-3, 1e-2, 0.3]),
    share=st.floats(-1, 1),  # levels below σ₁² too
    exact=st.booleans(),
    seed=st.integers(0, 999),
)
def test_bounds_of_a_quick_ritz_pair_are_never_violated(m: int, p: float, room: float, share: float, exact: bool, seed: int) -> None:
    """However early the float32 recurrence stops, what is claimed of σ₁² holds: factorisations with probes or shift, and the trace."""
    A = with_spectrum(np.arange(1, 161.0) ** -p, m, 160, seed)
    top = float(np.linalg.svd(A.astype(np.float64), compute_uv=False)[0] ** 2)
    gram = GramMatrix(A, np.random.default_rng(seed).standard_normal(160), exact=exact, target=lambda theta: (1 + room) * theta)
    assert gram.theta == pytest.approx(top, rel=max(room, 1e-4))
    level = gram.theta * (1 + share * room)
    seen = gram.proved_bound(level) if exact else gram.probed_bound(level, np.random.default_rng(seed), room=room * level)
    trace = leading_space_bound(A, gram.vector[:, None], level)
    assert trace is None or level >= top * (1 - 1e-13)
    for claim in (seen, trace):
        if claim is not None:
            assert claim.lower <= top * (1 + 1e-13)
            assert claim.upper >= top * (1 - 1e-13)


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_one_vector_is_enough_for_a_steep_spectrum(power: float) -> None:
    W = with_spectrum(np.arange(1, 301.0) ** -power, 400, 300, seed=6)
    found = stable_rank(W)
    assert (found.decided_by, found.steps, found.failure_probability) == ("trace", 2, 0)
    assert found.lower <= svd_stable_rank(W) * (1 + 1e-12) <= found.upper * (1 + 1e-11)
