"""Sparse coding: the lasso's laws, unfolded solvers, and the problems and the agent that use them; laws in float64."""

import copy
import itertools
import math

import gymnasium
import numpy as np
import pytest
import torch
from drawn import drawn
from gymnasium.utils.env_checker import check_env
from sklearn.decomposition import sparse_encode

from rlamort.agent import Player
from rlamort.domain import Euclid
from rlamort.env import Spec
from rlamort.env.one_step import OneStep
from rlamort.envs import sparse
from rlamort.envs.sparse import Lasso, Patches, SparseRecovery, nmse, solve, unit
from rlamort.errors import UserError
from rlamort.measure.check import check
from rlamort.measure.claims import coding
from rlamort.model import Full, Unroll
from rlamort.nets import Zeros
from rlamort.objective import Cost
from rlamort.problem import Problem
from rlamort.solve.classical import best_found
from rlamort.source import Contexts
from rlamort.update.sparse import (
    Alista,
    Fista,
    GradientRestart,
    Ista,
    Lista,
    ListaCp,
    Momentum,
    NoRestart,
    Psd,
    Safeguarded,
    StepIsta,
    analytic,
    shrink,
)

M, N, B, K = 6, 10, 7, 5
LEARNED = {
    "lista": lambda ista: Lista(ista, K),
    "lista_cp": lambda ista: ListaCp(ista, K),
    "slista": lambda ista: StepIsta(ista, K),
    "slista, by coordinate": lambda ista: StepIsta(ista, K, N),
    "alista": lambda ista: Alista(ista, K),
    "momentum": lambda ista: Momentum(StepIsta(ista, K), K),
}


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def ista():
    return Ista(unit(torch.randn(M, N)), 0.1)


@pytest.fixture
def x():
    return torch.randn(B, M)


def path(update, x, steps=K, atoms=N):
    """(steps + 1, B, N) from zero."""
    return Unroll(Full(Zeros(atoms), Euclid(atoms)), update, steps, Euclid(atoms)).iterates(x)


def shaken(update):
    """With parameters as training might leave them."""
    with torch.no_grad():
        for p in update.parameters():
            p += 0.3 * torch.randn_like(p)
    return update


def test_shrink_is_the_proximal_map_of_the_one_norm():
    v, theta = torch.randn(200), torch.rand(200)
    y = shrink(v, theta)
    grid = torch.linspace(-4, 4, 8001)[:, None]
    best = grid[(0.5 * (grid - v).square() + theta * grid.abs()).argmin(0)][:, 0]
    assert (y - best).abs().max() < 1e-3
    assert (y[v.abs() <= theta] == 0).all()


def test_the_solution_is_scikit_learns(ista, x):
    y = solve(ista, x)
    dictionary = ista.dictionary.mT.numpy()
    theirs = sparse_encode(x.numpy(), dictionary, algorithm="lasso_cd", alpha=ista.alpha, max_iter=20_000)
    assert (ista.cost(y, x) <= ista.cost(torch.from_numpy(theirs), x) + 1e-6).all()
    exact = solve(ista, x, torch.randn(B, N))  # from anywhere
    assert torch.allclose(ista.cost(exact, x), ista.cost(y, x), rtol=1e-6)


def test_the_duality_gap_bounds_the_distance_to_the_minimum(ista, x):
    best = ista.cost(solve(ista, x), x)
    for y in (torch.zeros(B, N), torch.randn(B, N), *path(ista, x, 30)):
        assert (ista.gap(y, x) >= ista.cost(y, x) - best - 1e-9).all()
    assert (ista.gap(solve(ista, x), x) <= 1e-7 * best).all()


def test_ista_never_raises_the_cost_and_stays_at_the_solution(ista, x):
    costs = torch.stack([ista.cost(y, x) for y in path(ista, x, 50)])
    assert (costs.diff(dim=0) <= 1e-12).all()
    y = solve(ista, x)
    assert (ista.step(y, x) - y).abs().max() < 1e-4


@pytest.mark.parametrize("restart", [NoRestart(), GradientRestart()])
def test_fista_is_as_fast_as_its_theorem_says(ista, x, restart):
    best = solve(ista, x)
    for k, y in enumerate(path(Fista(ista, restart), x, 60)):  # Beck and Teboulle, theorem 4.4
        bound = 2 / ista.size * best.square().sum(-1) / (k + 1) ** 2
        assert (ista.cost(y, x) - ista.cost(best, x) <= bound + 1e-9).all()


def test_restarts_make_the_end_faster():
    hard = Ista(unit(torch.randn(40, 20) + 3), 0.01)
    x = torch.randn(B, 40)
    best = hard.cost(solve(hard, x), x)
    plain, restarted = (
        (hard.cost(path(Fista(hard, how), x, 400, 20)[-1], x) - best).mean() for how in (NoRestart(), GradientRestart())
    )
    assert restarted < plain / 50


@pytest.mark.parametrize("name", ["lista", "lista_cp", "slista", "slista, by coordinate"])
@pytest.mark.parametrize("rate", [0.7, 1.0, 1.9])
def test_before_training_it_is_ista(name, rate, ista, x):
    plain = Ista(ista.dictionary, ista.alpha, rate)
    assert torch.allclose(path(LEARNED[name](plain), x), path(plain, x), rtol=1e-10, atol=1e-13)


def test_before_training_momentum_is_fista(ista, x):
    assert torch.allclose(path(LEARNED["momentum"](ista), x), path(Fista(ista), x), rtol=1e-10, atol=1e-13)


def test_the_analytic_weights_satisfy_their_constraints_and_are_the_least():
    a = unit(torch.randn(M, N))
    w = analytic(a)
    assert torch.allclose((w * a).sum(0), torch.ones(N), atol=1e-10)
    least = (w.mT @ a).square().sum()
    for _ in range(50):
        other = w + 0.1 * torch.randn(M, N)
        other = other + a * (1 - (other * a).sum(0))  # back to where columns have product 1
        assert torch.allclose((other * a).sum(0), torch.ones(N))
        assert (other.mT @ a).square().sum() > least
    pseudo = torch.linalg.pinv(a).mT
    assert torch.allclose(w, pseudo / (pseudo * a).sum(0))  # HyperLISTA's form
    with pytest.raises(UserError, match="do not span"):
        analytic(torch.randn(N, M))


@pytest.mark.parametrize("name", LEARNED)
def test_safeguarded_no_item_is_above_ista_at_any_layer(name, ista, x):
    theirs = torch.stack([ista.cost(y, x) for y in path(ista, x, 12)])
    for _ in range(10):
        guarded = Safeguarded(shaken(LEARNED[name](ista)), ista)
        ours = torch.stack([ista.cost(y, x) for y in path(guarded, x, 12)])
        assert (ours <= theirs + 1e-13).all()
        assert (ours.diff(dim=0) <= 1e-13).all()


def test_safeguarded_a_step_that_is_not_finite_is_ista(ista, x):
    broken = Lista(ista, K)
    with torch.no_grad():
        broken.read.fill_(torch.nan)
    assert torch.equal(path(Safeguarded(broken, ista), x), path(ista, x))


def test_safeguarded_a_good_step_is_taken(ista, x):
    better = StepIsta(Ista(ista.dictionary, ista.alpha, 1.5), K)
    good, plain = path(better, x, 1)[1], path(ista, x, 1)[1]
    lower = ista.cost(good, x) <= ista.cost(plain, x)
    assert 0 < lower.sum() < B
    assert torch.equal(path(Safeguarded(better, ista), x, 1)[1], torch.where(lower[:, None], good, plain))


@pytest.mark.parametrize("name", LEARNED)
def test_derivatives_are_finite_differences(name, ista, x):
    update = shaken(LEARNED[name](ista))
    parameters = dict(update.named_parameters())

    def end(*values):
        given = dict(zip(parameters, values, strict=True))
        y = torch.func.functional_call(_Path(update), {f"update.{k}": v for k, v in given.items()}, (x[:2],))
        return y.square().sum()

    assert torch.autograd.gradcheck(end, tuple(p.detach().requires_grad_() for p in parameters.values()))


class _Path(torch.nn.Module):
    def __init__(self, update):
        super().__init__()
        self.update = update

    def forward(self, x):
        return path(self.update, x, 3)[-1]


@pytest.mark.parametrize("name", [*LEARNED, "fista", "safeguarded"])
def test_an_item_does_not_depend_on_its_neighbours(name, ista, x, device):
    x = x.to(device)
    made = {
        "fista": lambda i: Fista(i, GradientRestart()),
        "safeguarded": lambda i: Safeguarded(shaken(Lista(i, K)), i),
    } | LEARNED
    update = shaken(made[name](copy.deepcopy(ista))).to(device)
    whole, alone = path(update, x, 12), path(update, x[3:4], 12)
    assert torch.allclose(whole[:, 3:4], alone, rtol=1e-9, atol=1e-12)
    assert len(path(update, x[:0], 2)[-1]) == 0


def test_a_solution_does_not_depend_on_its_neighbours(ista, x):
    scaled = x * torch.logspace(-1, 1, B)[:, None]  # some are finished long before others
    assert torch.allclose(solve(ista, scaled)[2:3], solve(ista, scaled[2:3]), rtol=1e-9, atol=1e-12)


def test_layers_beyond_the_last_have_its_numbers(ista, x):
    update = shaken(ListaCp(ista, 3))
    longer = ListaCp(ista, 4)
    with torch.no_grad():
        longer.weight.copy_(update.weight)
        longer.theta.copy_(update.theta[[0, 1, 2, 2]])
    assert torch.equal(path(update, x, 4), path(longer, x, 4))


def test_the_encoder_is_a_shrunk_hyperbolic_tangent(ista, x):
    encoder = shaken(Psd(ista))
    inner = encoder.gain * torch.tanh(x @ encoder.filters.mT + encoder.bias)
    assert torch.allclose(encoder(x), shrink(inner, torch.nn.functional.softplus(encoder.theta)), atol=1e-12)
    assert (encoder(x) == 0).any()


def small():
    return Lasso(alpha=0.2, side=4, atoms=24, whitening=0.0, dictionary=torch.randn(16, 24))


@pytest.mark.parametrize("make", [small, lambda: SparseRecovery(12, 20)], ids=["lasso", "recovery"])
def test_the_problems_are_what_they_say(make):
    problem = make()
    report = check(problem)
    assert report.ok, str(report)
    a = problem.ista.dictionary
    assert torch.allclose(torch.linalg.vector_norm(a, dim=0), torch.ones(a.shape[1]))
    x = problem.contexts(5)
    y = problem.solution(x)
    found = best_found(Cost(problem), problem.domain, problem.layout.pack(x))
    assert (problem.cost(y, x) <= found.cost * (1 + 1e-6)).all()  # no other search finds better
    assert torch.allclose(problem.map(y, x), y, atol=1e-3)
    assert (problem.residual(y, x) <= 1e-6 * problem.cost(y, x)).all()


def test_codes_are_recovered_and_hidden_from_models():
    problem = SparseRecovery(60, 100, density=0.05, alpha=0.005)
    assert (problem.layout.dim, problem.layout.seen.dim) == (160, 60)
    x, y = problem.contexts(400).values()
    assert torch.allclose(y @ problem.ista.dictionary.mT, x)
    assert abs((y != 0).double().mean().item() - 0.05) < 0.005
    assert abs(y[y != 0].std().item() - 1) < 0.05
    assert nmse(problem.solution(x), y) < -25
    assert nmse(torch.zeros_like(y), y) == pytest.approx(0)
    assert nmse(1.1 * y, y).item() == pytest.approx(-20)
    noisy = SparseRecovery(60, 100, noise=0.5)
    x, y = noisy.contexts(400).values()
    assert (x - y @ noisy.ista.dictionary.mT).std().item() == pytest.approx(0.5, rel=0.05)


def test_what_is_held_out_is_not_trained_on():
    patches = Patches(8, 0.0)
    seen = round((1 - sparse.HELD_OUT) * patches.images.shape[2])
    patches.images = patches.images.clone()
    patches.images[:, :, :seen] = 0.5
    assert (patches.draw(2_000, 0, 1 - sparse.HELD_OUT) == 0).all()
    patches.images[:, :, seen:] = torch.rand_like(patches.images[:, :, seen:])
    assert (patches.draw(2_000, 1 - sparse.HELD_OUT, 1).std(-1) > 0.9).all()


def test_patches_are_normalised_and_whitened():
    plain, white = (Patches(6, whitening) for whitening in (0.0, 0.1))
    x = plain.draw(5_000, 0, 1)
    assert x.mean(-1).abs().max() < 1e-12
    assert (x.square().mean(-1) <= 1).all()
    assert x.square().mean(-1).max() > 0.99

    def spread(x):
        values = torch.linalg.eigvalsh(x.mT @ x)
        return (values[-1] / values[1]).item()  # the mean's own direction, the first, has none

    assert spread(white.draw(5_000, 0, 1)) < spread(x) / 5


def test_a_learned_dictionary_is_the_same_every_time_and_fits_its_patches():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = sparse.learned(4, 20, 0.0)
    assert torch.equal(torch.get_rng_state(), state)
    sparse.learned.cache_clear()
    torch.manual_seed(4)
    assert torch.equal(sparse.learned(4, 20, 0.0), first)
    x = Patches(4, 0.0).draw(300, 0.8, 1)
    ours, random = (Ista(unit(a), 0.5) for a in (first, torch.randn(16, 20)))
    assert ours.cost(solve(ours, x), x).mean() < 0.9 * random.cost(solve(random, x), x).mean()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ista(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), 0.1), r"columns \[1\] are zero"),
        (lambda: Lasso(side=4, dictionary=torch.zeros(16, 3)), r"columns \[0, 1, 2\] are zero"),
        (lambda: Ista(torch.full((2, 2), torch.nan), 0.1), "finite numbers"),
        (lambda: Ista(torch.randn(2, 3), 0.0), "alpha: 0.0 given"),
        (lambda: Ista(torch.randn(2, 3), 0.1, 2.0), "rate: 2.0 given"),
        (lambda: Lasso(alpha=-1.0), "alpha=-1.0"),
        (lambda: Lasso(atoms=0), "atoms=0"),
        (lambda: Lasso(side=1), "side=1: patches of 2 to 128"),
        (lambda: Lasso(side=129), "side=129"),
        (lambda: Lasso(whitening=-0.1), "whitening=-0.1"),
        (lambda: Lasso(side=4, dictionary=torch.randn(9, 3)), r"\(16, N\) is needed"),
        (lambda: SparseRecovery(alpha=0.0), "alpha: 0.0"),
        (lambda: SparseRecovery(density=0.0), "density=0.0"),
        (lambda: SparseRecovery(noise=-1.0), "noise=-1.0"),
        (lambda: SparseRecovery(measurements=0), "measurements=0"),
        (lambda: SparseRecovery(measurements=20, atoms=0), "atoms=0"),
        (lambda: Lista(Ista(torch.randn(2, 3), 0.1), 0), "layers: 0 given"),
        (lambda: StepIsta(Ista(torch.randn(2, 3), 0.1), 2, 2), "coordinates: 2 given"),
        (lambda: Safeguarded(Fista(Ista(torch.randn(2, 3), 0.1)), Ista(torch.randn(2, 3), 0.1, 1.5)), "rate: 1.5"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


class Plain(Problem):
    domain = Euclid(2)

    def contexts(self, count):
        return torch.randn(count, 2)

    def cost(self, y, x):
        return (y - x).square().sum(-1)


def spec_of(problem):
    return OneStep(problem, 1, torch.device("cpu")).spec


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (Plain, {}, "Plain: it has no `ista`"),
        (small, {"loss": "truth"}, "loss.teacher.key=codes: it is not a hidden key of Lasso: none"),
        (small, {"model": {"kind": "psd", "update": {"kind": "momentum", "update": "ista"}}}, "Ista learns nothing"),
        (small, {"model.steps": 0}, "layers: 0"),
        (small, {"layers": 4}, "layers: there is no such key. It is model.steps now"),
    ],
)
def test_what_cannot_be_trained_is_named(make, fields, message):
    with pytest.raises(UserError, match=message):
        drawn("amortize", spec_of(make()), **{"model": "lista", **fields})
    with pytest.raises(UserError, match="objective is not known"):
        drawn("lista", Spec(2, [-1.0], [1.0]))


@pytest.mark.parametrize("loss", ["objective", "iterates", "regress", "truth"])
@pytest.mark.parametrize("model", ["psd", "lista", "lista_cp", "alista", "slista"])
def test_training_lowers_what_it_is_asked_to(model, loss, device):
    torch.set_default_dtype(torch.float32)
    problem = SparseRecovery(20, 30).to(device)
    agent = drawn("amortize", spec_of(problem), **{"model": model, "model.steps": 3}, loss=loss, learning_rate=1e-2).to(device)
    posed = problem.layout.pack(problem.contexts(200)).to(device)
    x, truth = agent.f.seen(posed), posed[:, 20:]

    def score():
        with torch.no_grad():
            path = agent.model.iterates(x, agent.f.oracle(x))
            costs = [problem.cost(y, x).mean().item() for y in path]
            far = [(y - truth).square().sum(-1).mean().item() for y in path]
            near = (path[-1] - problem.solution(x)).square().sum(-1).mean().item()
            return {"objective": costs[-1], "iterates": sum(costs[1:]), "regress": near, "truth": far[-1]}[loss]

    before = score()
    for _ in range(60):
        agent.improve(Contexts(problem.layout.pack(problem.contexts(64)).to(device)))
    assert score() < before


def test_the_answer_is_safeguarded_but_not_the_training():
    problem = small()
    guarded = {"kind": "Safeguarded", "inner": {"steps": 4}}
    agent = drawn("amortize", spec_of(problem), model=guarded, loss="iterates", learning_rate=1e-1)
    x = problem.contexts(50)
    theirs = problem.cost(path(problem.ista, x, 4, 24)[-1], x)
    for _ in range(10):  # far too fast
        agent.improve(Contexts(problem.contexts(32)))
    with torch.no_grad():
        assert (problem.cost(agent.act(x, explore=False), x) <= theirs + 1e-12).all()
    assert torch.is_grad_enabled()  # a player guards itself
    assert (problem.cost(Player(agent, len(x))(x, explore=False), x) <= theirs + 1e-12).all()
    raw = path(agent.model.trained.update, x, 4, 24)[-1]
    assert (problem.cost(raw, x) > theirs).any()


def test_true_codes_reach_the_loss_alone():
    """With codes that are no numbers, what is answered is the same, and the loss is none."""
    problem = SparseRecovery(12, 20)
    agent = drawn("lista_cp", spec_of(problem), **{"model.steps": 2})
    x = problem.layout.pack(problem.contexts(8))
    poisoned = x.clone()
    poisoned[:, 12:] = math.nan
    for one in (x, poisoned):
        answer = agent.model(agent.f.seen(one), agent.f.oracle(one))
        assert torch.equal(answer, agent.act(x[:, :12], explore=False))
    assert agent.loss(agent.model, agent.f, Contexts(x))[0].isfinite()
    assert agent.loss(agent.model, agent.f, Contexts(poisoned))[0].isnan()


@pytest.mark.parametrize("name", ["Lasso", "SparseRecovery"])
def test_they_are_gymnasium_environments(name):
    torch.set_default_dtype(torch.float32)
    small = {"side": 4, "atoms": 24} if name == "Lasso" else {"measurements": 12, "atoms": 20}
    env = gymnasium.make(f"rlamort/{name}-v0", **small)
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


def test_the_first_iteration_that_is_as_good():
    assert coding.first([3.0, 2.0, 1.0], 2.0) == 1
    assert coding.first([3.0, 2.0, 1.0], 0.5) == 3  # never: as many as were tried


def test_a_baselines_curve_is_its_path():
    problem = SparseRecovery(12, 20)
    x = problem.contexts(4)["signals"]
    update = Fista(problem.ista)

    def mean(y):
        return problem.cost(y, x).mean().item()

    curve = coding._curve(problem, update, x, mean)
    expected = [mean(y) for y in path(update, x, 20, 20)]
    assert np.allclose(curve[:21], expected)
    assert len(curve) == coding.LIMIT + 1
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(coding._curve(problem, problem.ista, x, mean)))
