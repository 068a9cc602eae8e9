"""Variational inference: bounds against closed forms and quadrature, gaps, data that is not what it should be."""

import gzip
import hashlib
import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from rlamort.config import methods
from rlamort.domain import Gaussian
from rlamort.envs import images
from rlamort.envs.vae import (
    VAE,
    Averaged,
    Bernoulli,
    Convolutional,
    FixedNoise,
    Joint,
    Normal,
    Reconstruction,
    Relative,
    warped,
)
from rlamort.errors import UserError
from rlamort.measure.claims import inference, ivae, savae
from rlamort.measure.claims import vae as vae_claims
from rlamort.measure.claims.inference import Tuning, adam
from rlamort.measure.claims.savae import Differenced, DifferencedOracle
from rlamort.measure.claims.vae import needed
from rlamort.model import Expert, Full, Unroll
from rlamort.objective import Cost, Soft, Temperature
from rlamort.problem import draw
from rlamort.run.learner import learner_class
from rlamort.update import Gradient, Learned

QUICK = {"hidden": (16,), "batch_size": 16, "steps": 4, "device": "cpu"}


@pytest.fixture
def vae(device):
    torch.manual_seed(0)
    return VAE(latent=3, hidden=(20,)).double().to(device)


@pytest.fixture
def linear():
    """x | z ~ N(W z + b, s^2), whose posterior and evidence are known (Tipping and Bishop, 1999)."""
    torch.manual_seed(0)
    problem = VAE(latent=2, decoder=nn.Linear(2, 64), likelihood=Normal(0.5)).double()
    w, b = problem.decoder.weight.detach(), problem.decoder.bias.detach()
    x = problem.contexts(5)
    precision = torch.eye(2) + w.T @ w / 0.25
    mean = torch.linalg.solve(precision, w.T @ (x - b).T / 0.25).T
    evidence = torch.distributions.MultivariateNormal(b, w @ w.T + 0.25 * torch.eye(64, dtype=torch.float64)).log_prob(x)
    return problem, x, mean, precision, evidence


def some(problem, count=4):
    device = problem.test_images.device
    x = problem.test_images[:count]
    return x, 0.5 * torch.randn(count, problem.domain.inputs, dtype=torch.float64, device=device)


def test_soft_with_temperature_one_is_the_closed_form_bound(linear):
    """E_q log p(x | z) - KL has a closed form where the decoder is linear: Soft must have that mean, in both of its forms."""
    problem, x, *_ = linear
    w, b = problem.decoder.weight.detach(), problem.decoder.bias.detach()
    lam = 0.3 * torch.randn(5, 4, dtype=torch.float64)
    mean, std = lam[:, :2], lam[:, 2:].exp()
    error = (x - mean @ w.T - b).square().sum(-1) + (std.square()[:, None] * w.square()).sum((-1, -2))
    kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum(-1)
    exact = -error / 0.5 - 64 * math.log(0.5 * math.sqrt(2 * math.pi)) - kl
    for f in (
        Soft(Joint(problem), Gaussian(2), Temperature(1.0)),
        Soft(Reconstruction(problem), Relative(2), Temperature(1.0)),
    ):
        draws = -Averaged(f, 3_000).each(lam, x).detach()
        assert ((draws.mean(-1) - exact).abs() < 5 * draws.std(-1) / 3_000**0.5).all()
    torch.testing.assert_close(problem.elbo(lam, x, 4_000), exact, rtol=0.02, atol=0)


def test_the_closed_form_divergence_takes_noise_away(vae):
    x, lam = some(vae)
    spread = [
        Averaged(Soft(f, density, Temperature(1.0)), 2_000).each(lam, x).std(-1).mean().item()
        for f, density in ((Joint(vae), Gaussian(3)), (Reconstruction(vae), Relative(3)))
    ]
    assert spread[1] != pytest.approx(spread[0], rel=1e-3)
    at_prior = torch.zeros_like(lam)
    assert (vae.density.sample(at_prior)[1] == 0).all()  # KL(p | p), whatever was drawn


def test_a_reparameterised_gradient_is_that_of_the_bound_with_the_same_noise(vae):
    x, lam = some(vae, 2)
    noise = torch.randn(5, 3, dtype=torch.float64, device=x.device)
    f = vae.freeze().bound(noise)
    assert torch.autograd.gradcheck(lambda lam: f(lam, x), lam.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda lam: f(lam, x), lam)


def test_importance_weighting_rises_with_samples_to_the_evidence(linear):
    problem, x, mean, precision, evidence = linear
    exact = torch.cat([mean, torch.full_like(mean, -0.5) * precision.diagonal().log()], dim=-1)
    wide = torch.cat([mean, exact[:, 2:] + 0.5], dim=-1)
    torch.manual_seed(1)
    bounds = [torch.stack([problem.iwae(wide, x, k) for _ in range(400 // k + 1)]).mean() for k in (1, 5, 50)]
    assert bounds[0] < bounds[1] < bounds[2] < evidence.mean() + 0.02
    torch.testing.assert_close(problem.iwae(wide, x, 5_000), evidence, rtol=0, atol=0.1)


def test_the_gaps_of_a_linear_decoder_are_known(linear):
    """ELBO = log p(x) - KL(q | posterior); the best diagonal Gaussian has the inverse of the precision's diagonal."""
    problem, x, mean, precision, evidence = linear
    best = torch.cat([mean, -0.5 * precision.diagonal().log().expand_as(mean)], dim=-1)
    posterior = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)

    def loss(lam):
        covariance = torch.diag_embed((2 * lam[:, 2:]).exp())
        return torch.distributions.kl_divergence(torch.distributions.MultivariateNormal(lam[:, :2], covariance), posterior)

    off = best + 0.2
    gaps = problem.decompose(Expert(lambda _: off), x, samples=4_000, steps=200)
    torch.testing.assert_close(gaps.lam, best, rtol=0, atol=0.25)  # it is the best under 64 draws
    torch.testing.assert_close(gaps.amortization.mean(), (loss(off) - loss(gaps.lam)).mean(), rtol=0.1, atol=0)
    torch.testing.assert_close(gaps.approximation.mean(), loss(gaps.lam).mean(), rtol=0, atol=0.15)
    assert loss(best).mean() <= loss(gaps.lam).mean() < loss(best).mean() + 0.1
    assert (gaps.log_likelihood - evidence).abs().max() < 0.2


def test_the_best_is_never_worse_than_where_it_started(vae):
    x, lam = some(vae)
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).to(x)  # the one that it is found under
    f = vae.bound(noise)
    costs = f(vae.optimum(x, [lam, torch.zeros_like(lam)], steps=3), x)
    assert (costs <= torch.minimum(f(lam, x), f(torch.zeros_like(lam), x))).all()
    torch.testing.assert_close(vae.optimum(x[2:3], [lam[2:3]], steps=5), vae.optimum(x, [lam], steps=5)[2:3])


def test_steps_after_the_encoder_do_not_depend_on_the_batch(vae):
    """The reference code of Kim et al. takes gradients of the batch's mean and clips its norm; here 1 and 64 are alike."""
    x = draw(vae, 64)
    noise = torch.randn(4, 3, dtype=torch.float64, device=x.device)
    encoder = Full(vae.network((8,), 1).double().to(x.device), vae.domain)
    model = Unroll(encoder, Gradient(Learned(0.01, 6, 8).double().to(x.device), clip=5.0), 8, vae.domain)
    f = vae.bound(noise)
    together = model.iterates(x, f.oracle(x))
    alone = [model.iterates(x[i : i + 1], f.oracle(x[i : i + 1])) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone, dim=1), together[:, :3])
    assert (f(together[-1], x) < f(together[0], x)).all()


def test_refined_inference_has_the_exact_gradient(vae):
    """Through eight steps, second derivatives included: against finite differences, in the encoder and in the decoder."""
    x = vae.test_images[:3]
    f = vae.bound(torch.randn(2, 3, dtype=torch.float64, device=x.device))
    encoder = Full(vae.network((4,), 1).double().to(x.device), vae.domain)
    model = Unroll(encoder, Gradient(0.01), 8, vae.domain)
    for parameter in (encoder.net[0].bias, vae.decoder[0].bias, vae.decoder[2].weight):
        loss = f(model(x, f.oracle(x)), x).mean()
        (slope,) = torch.autograd.grad(loss, parameter)
        index = slope.abs().flatten().argmax()
        values = []
        for size in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.view(-1)[index] += size
                values.append(f(model(x, f.oracle(x)), x).mean())
                parameter.view(-1)[index] -= size
        assert slope.flatten()[index].item() == pytest.approx((values[0] - values[1]).item() / 2e-5, rel=1e-5)


def test_finite_differences_approach_the_exact_gradient_of_refined_inference(vae):
    """What `reproduce savae` holds against it, Kim et al.'s way, is the same gradient in float64, but not in float32."""
    for dtype, near, far in ((torch.float64, 0.0, 1e-4), (torch.float32, 1e-3, 1.0)):
        posed = vae.to(dtype)
        x = posed.test_images[:3]
        f = posed.bound(torch.ones(1, 3, dtype=dtype, device=x.device))
        encoder = Full(nn.Linear(64, 6).to(x), posed.domain)
        owned = [p for p in posed.parameters() if p.requires_grad]
        model = Unroll(encoder, Gradient(0.02), 3, posed.domain)
        slopes = [
            torch.cat([g.ravel() for g in torch.autograd.grad(f(model(x, oracle), x).mean(), [*owned, *encoder.parameters()])])
            for oracle in (f.oracle(x), DifferencedOracle(lambda f=f: f, x, owned))
        ]
        assert near < (slopes[1] - slopes[0]).norm() / slopes[0].norm() < far


def test_both_ways_to_second_derivatives_ask_the_same_gradient(device):
    """A race between them is one of derivatives alone: the same draws, and as many of them."""
    torch.manual_seed(0)
    posed = VAE(latent=3, hidden=(20,), draws=4).double().to(device)
    x, lam = some(posed)
    slopes = []
    for kind in (Cost, Differenced):
        torch.manual_seed(1)
        slopes.append(kind(posed).oracle(x).grad(lam))
    torch.testing.assert_close(slopes[0], slopes[1])


def test_adam_reaches_what_it_is_raced_to(vae, monkeypatch):
    monkeypatch.setattr(vae_claims, "LIMIT", 40)
    posed = vae.float().freeze()
    x = posed.test_images[:4]
    judge, tuning = posed.bound(torch.randn(32, 3).to(x)), Tuning(0.1, 50.0, 4)
    path = list(itertools.islice(adam(posed, x, tuning), 30))
    target = judge(path[-1], x).mean().item()
    assert target < judge(torch.zeros_like(path[0]), x).mean().item()
    steps = needed(posed, x, judge, {50: target + 0.05, 400: -1e9}, tuning)
    assert 1 <= steps[50] < steps[400] == 40


@pytest.fixture
def small(monkeypatch):
    """The measurements of `reproduce`, at sizes at which they mean nothing."""
    monkeypatch.delenv("RLAMORT_IMAGES", raising=False)
    few = {"HELD_OUT": 16, "SCORED": 10, "FEWER": 5, "BEST_STEPS": 3, "LIMIT": 10, "PROTOCOL": 10, "DECODER": (16,)}
    short = {"UPDATES": 5, "REFINED": 3, "ITERATIVE": 3, "WIDTH": 8, "WIDTHS": (4, 8)}
    modules = (inference, vae_claims, savae, ivae)
    for name, value in {**few, **short, "SHARED": {"hidden": (8,), "batch_size": 8}}.items():
        for module in (one for one in modules if hasattr(one, name)):
            monkeypatch.setattr(module, name, value)
    kept = (inference.decoder, inference.encoder, savae.refined, ivae.frozen)
    for one in kept:
        one.cache_clear()
    yield
    for one in kept:
        one.cache_clear()


@pytest.mark.parametrize(
    ("measure", "claims"),
    [(vae_claims.measure, 4), (savae.measure, 3), (savae.differences, 3), (ivae.measure, 3), (ivae.from_prior, 3)],
    ids=["vae", "savae", "differences", "ivae", "ivae from the prior"],
)
def test_measurements_run_from_end_to_end(small, measure, claims):
    measured = measure()
    assert len(measured.verdicts) == claims
    assert json.loads(json.dumps(measured.data))["data"] == "scikit-learn's digits"
    assert all("nan" not in verdict.measured for verdict in measured.verdicts)


def test_images_set_aside_are_neither_trained_on_nor_held_out(monkeypatch):
    monkeypatch.delenv("RLAMORT_IMAGES", raising=False)
    kept, whole = inference.problem().train_images, images.load("digits")
    assert len(inference.aside()) == 187
    torch.testing.assert_close(torch.cat([whole.train[:187], kept[:, 0]]), whole.train, rtol=0, atol=0)


def test_a_run_is_evaluated_on_images_that_it_is_not_trained_on():
    problem = VAE(latent=2, hidden=(8,))
    learner = learner_class("vae")(problem, **QUICK).learn(2)
    learner.score(20)
    held = set(map(tuple, problem.test_images.tolist()))
    met = learner.environments.evaluation(20).x
    assert len(met.unique(dim=0)) == 20
    assert set(map(tuple, met.tolist())) <= held
    assert not set(map(tuple, learner.source.env.reset(0).tolist())) & held


def test_what_is_held_out_comes_once_before_it_comes_again():
    problem = VAE(latent=2, hidden=(8,))
    few, many = problem.held_out(50), problem.held_out(2 * 297)
    known = {tuple(one): i for i, one in enumerate(problem.test_images.tolist())}
    assert len(few.unique(dim=0)) == 50
    counts = np.bincount([known[tuple(one)] for one in many.tolist()])
    assert counts.sum() == 594
    assert counts.max() == 2


def test_contexts_are_binarised_anew_and_the_held_out_are_not():
    problem = VAE(latent=2, hidden=(8,))
    assert set(problem.contexts(20).unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(problem.test_images, VAE(latent=2, hidden=(8,)).test_images, rtol=0, atol=0)
    many = torch.stack([problem.likelihood.pixels(problem.train_images[:1].flatten(1)) for _ in range(4_000)])
    torch.testing.assert_close(many.mean(0), problem.train_images[:1].flatten(1), rtol=0, atol=0.05)
    assert not set(map(tuple, problem.train_images[:300].flatten(1).tolist())) & set(
        map(tuple, images.load("digits").test.flatten(1).tolist())
    )


def test_freezing_holds_the_decoder(vae):
    assert {"decoder.0.weight"} < {name for name, p in vae.named_parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in vae.freeze().parameters())


def test_the_temperature_is_no_parameter_to_learn(vae):
    assert not vae.alpha.log.requires_grad
    assert vae.alpha() == 1


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("decoder", ["mlp", "conv"])
def test_decoders_and_likelihoods_learn_with_the_encoder(decoder, likelihood):
    torch.manual_seed(0)
    problem = VAE(latent=4, hidden=(8, 8), decoder=decoder, likelihood=likelihood, draws=2)
    x = problem.test_images[:50]
    learner = learner_class("vae")(problem, **QUICK | {"learning_rate": 1e-2})
    before = [p.clone() for p in problem.parameters() if p.requires_grad]
    bounds = []
    for _ in range(2):
        torch.manual_seed(5)
        bounds.append(problem.elbo(learner.agent.model(x), x, 20).mean().item())
        learner.learn(40, reset_num_timesteps=False)
    assert bounds[1] > bounds[0] + 1
    after = [p for p in problem.parameters() if p.requires_grad]
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert problem.mean(torch.randn(3, 4)).shape == (3, 64)


@pytest.mark.parametrize("row", ["vae", "savae", "ivae"])
def test_rows_train_with_and_without_a_decoder(row):
    assert row in methods()
    problem = VAE(latent=3, hidden=(8,), warp=0.1)
    learner = learner_class(row)(problem, **QUICK).learn(4)
    frozen = {name: value.clone() for name, value in problem.freeze().state_dict().items()}
    other = learner_class(row)(problem, **QUICK).learn(4)
    torch.testing.assert_close(problem.state_dict(), frozen, rtol=0, atol=0)
    x = problem.test_images[:3]
    assert learner.agent.act(x, explore=False).shape == other.agent.act(x, explore=False).shape == (3, 6)


def test_an_update_descends_the_bound(vae):
    """The loss that Amortize descends is the mean of -ELBO, so its gradient agrees with that of `elbo` in expectation."""
    x, lam = some(vae)
    f = Cost(vae)
    loss = torch.stack([f(lam, x).detach() for _ in range(500)])
    assert ((loss.mean(0) + vae.elbo(lam, x, 3_000)).abs() < 5 * loss.std(0) / 400**0.5).all()


def test_warps_keep_pixels_in_range_and_nothing_else_at_zero():
    torch.manual_seed(0)
    given = torch.rand(6, 1, 8, 8)
    torch.testing.assert_close(warped(given, 0.0), given, rtol=0, atol=1e-5)
    moved = warped(given, 0.2)
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert (moved - given).abs().mean() > 0.05


def test_held_noise_is_the_same_at_every_call(vae):
    x, lam = some(vae)
    noise = torch.randn(2, 3, dtype=torch.float64, device=x.device)
    z, _ = FixedNoise(noise).sample(lam)
    torch.testing.assert_close(z, lam[:, :3] + lam[:, 3:].exp() * noise.repeat(2, 1))
    f = vae.bound(noise)
    torch.testing.assert_close(f(lam, x), f(lam, x), rtol=0, atol=0)


def test_likelihoods_are_those_of_torch():
    torch.manual_seed(0)
    out, x = torch.randn(4, 6), torch.rand(4, 6)
    normal = Normal(0.3)
    expected = torch.distributions.Normal(out, 0.3).log_prob(x).sum(-1)
    torch.testing.assert_close(normal(out, x), expected)
    x = x.round()
    torch.testing.assert_close(Bernoulli()(out, x), torch.distributions.Bernoulli(logits=out).log_prob(x).sum(-1))


# data


def idx(folder, name, pixels, packed=False):
    content = b"\0\0\x08\x03" + np.array(pixels.shape, ">u4").tobytes() + pixels.tobytes()
    if packed:
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    else:
        (folder / name).write_bytes(content)
    return content


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (7, 4, 8), dtype=np.uint8)


def test_images_come_from_arrays_and_from_idx_files(tmp_path, pixels):
    np.savez(tmp_path / "some.npz", train_x=pixels, test_x=pixels[:2] / 255)
    idx(tmp_path, "train-images-idx3-ubyte", pixels, packed=True)
    idx(tmp_path, "t10k-images-idx3-ubyte", pixels[:2])
    for data in (tmp_path / "some.npz", tmp_path):
        train, test = images.load(str(data))
        torch.testing.assert_close(train, torch.from_numpy(pixels / 255).float())
        torch.testing.assert_close(test, train[:2])
    assert VAE(str(tmp_path), decoder="conv", hidden=(2, 2)).size == (4, 8)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"train_x": np.full((3, 4, 4), 1.5)}, r"train_x holds numbers from 1.5 to 1.5; \[0, 1\]"),
        ({"train_x": np.full((3, 4, 4), np.nan)}, r"train_x holds numbers from nan"),
        ({"train_x": np.zeros((3, 5, 5))}, r"train images of 5 x 5, test images of 4 x 4; one size"),
        ({"train_x": np.zeros((0, 4, 4))}, r"shape \(0, 4, 4\)"),
        ({"train_x": np.zeros((3, 16))}, r"shape \(3, 16\)"),
        ({"train_x": np.zeros((3, 4, 4), dtype=bool)}, "of bool"),
        ({"train_y": np.zeros(3)}, "train_x"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "odd.npz", **{"test_x": np.zeros((2, 4, 4)), **arrays})
    with pytest.raises(UserError, match=said):
        VAE(str(tmp_path / "odd.npz"))


def test_missing_and_damaged_files_are_refused(tmp_path, pixels):
    with pytest.raises(UserError, match="cannot be read"):
        images.load(str(tmp_path / "none.npz"))
    for content in (b"", b"PK\3\4 and no more", b"text"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            images.load(str(tmp_path / "bad.npz"))
    with pytest.raises(UserError, match="neither train-images"):
        images.load(str(tmp_path))
    with pytest.raises(UserError, match=r"digits, mnist, an .npz"):
        images.load("cifar")
    content = idx(tmp_path, "train-images-idx3-ubyte", pixels)
    idx(tmp_path, "t10k-images-idx3-ubyte", pixels)
    for damaged in (content[:-1], content[:7], b"", b"\0" + content):
        (tmp_path / "train-images-idx3-ubyte").write_bytes(damaged)
        with pytest.raises(UserError, match="train-images-idx3-ubyte is damaged"):
            images.load(str(tmp_path))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(UserError, match="is damaged"):
        images.load(str(tmp_path))


def test_downloads_are_checked_before_they_are_kept(tmp_path, pixels, monkeypatch):
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    for name in images.CHECKSUMS:
        idx(there, name, pixels, packed=True)
    right = {name: hashlib.sha256((there / f"{name}.gz").read_bytes()).hexdigest() for name in images.CHECKSUMS}
    base = there.as_uri() + "/"
    with pytest.raises(UserError, match="SHA-256"):
        images.download(base, dict.fromkeys(right, "0" * 64), here)
    assert not list(here.iterdir())
    with pytest.raises(UserError, match="fetch it by hand"):
        images.download(base + "nowhere/", right, here)
    assert images.download(base, right, here) == here
    for file in there.iterdir():
        file.unlink()
    kept = images.load(str(images.download(base, right, here)))  # nothing is there to fetch any more
    torch.testing.assert_close(kept.train, torch.from_numpy(pixels / 255).float())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert images.cache() == tmp_path / "cache" / "rlamort"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"decoder": "mpl"}, "VAE.decoder=mpl.*Did you mean mlp"),
        ({"likelihood": "normal"}, "VAE.likelihood=normal"),
        ({"decoder": "conv"}, r"VAE.hidden=\[200\]"),
        ({"draws": 0}, "VAE.draws=0"),
        ({"latent": 0}, "Gaussian.dim"),
    ],
)
def test_wrong_fields_are_said_before_training(fields, said):
    with pytest.raises(UserError, match=said):
        VAE(**fields)


def test_a_convolutional_decoder_needs_sides_that_halve_twice():
    with pytest.raises(UserError, match="6 x 8"):
        Convolutional(2, (4, 4), (6, 8))
