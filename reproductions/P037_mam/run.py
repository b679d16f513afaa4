"""P037: one network gives the log-marginal of every subset in one pass, as accurately as a chain rule (2310.12920)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor
from worlds.enumerable import kl
from worlds.ising import Ising

from loglik.models.any_order import AnyOrderMarginals
from loglik.training.marginals import EnergyConfig, MarginalsConfig, fit_energy, fit_marginals

WORLD = Ising(side=3, coupling=0.4, bias=0.2)
SPACE = WORLD.space
DATA, STEPS, BATCH, LAYERS, WIDTH = 1_000_000, 3000, 256, 3, 128
LR, ALPHA, BLOCK = 2e-3, 4.0, 4
LIKELIHOOD, KL, FM, CONTROL, CHAIN = "likelihood", "KL", "FM", "KL, alpha = 0", "likelihood, chain rule"
TRAINED = (LIKELIHOOD, KL, FM, CONTROL)

CLAIM = Claim(
    paper="P037",
    text=(
        "After training, one forward pass of the marginal network (two with the empty set) gives the log-probability "
        "of any subset as accurately as an any-order autoregressive model, which needs a pass per entry."
    ),
    setup=(
        "Ising model on a 3 x 3 torus, coupling 0.4, bias 0.2: 512 configurations, 19,683 partial states, all exact. "
        "Two residual MLPs of 3 blocks of width 128; Adam at 0.002 with a cosine to 0, batches of 256. Maximum "
        "likelihood: 1,000,000 exact draws as data, 3,000 steps on the conditionals and 3,000 on the marginals (half "
        "data, half samples of the conditionals). Energy-based: 3,000 steps, KL-REINFORCE or flow matching (FM), "
        "alpha = 4, block Gibbs of 4 entries; and the KL variant with alpha = 0. Errors are |l(x_S) - l(empty) - "
        "log p(x_S)| over all partial states, each counted once; the chain rule goes through S in ascending order."
    ),
    checks=(
        Check(
            "accurate marginals in two passes",
            "maximum likelihood: mean error < 0.05 nats and Spearman correlation > 0.99 over all partial states, with "
            "2 passes against 9, in every seed",
            lambda m: (
                m[f"{LIKELIHOOD}: mean error"] < 0.05
                and m[f"{LIKELIHOOD}: spearman"] > 0.99
                and m["passes: marginal"] == 2
                and m["passes: chain rule"] == 9
            ),
            (f"{LIKELIHOOD}: mean error", f"{LIKELIHOOD}: spearman", "passes: marginal", "passes: chain rule"),
        ),
        Check(
            "KL-REINFORCE learns the distribution",
            "KL(p_phi || p) of the conditionals, mean over all orders, < 0.05 nats in every seed",
            lambda m: m[f"{KL}: divergence"] < 0.05,
            (f"{KL}: divergence",),
        ),
        Check(
            "as accurate as the chain rule",
            "mean error of the marginals < 1.5 times that of the chain rule of the same model, in every seed",
            lambda m: m[f"{LIKELIHOOD}: mean error"] < 1.5 * m[f"{CHAIN}: mean error"],
            (f"{LIKELIHOOD}: mean error", f"{CHAIN}: mean error"),
            main=False,
        ),
        Check(
            "useless without self-consistency",
            "KL variant: mean error with alpha = 0 more than 10 times that with alpha = 4, in every seed",
            lambda m: m[f"{CONTROL}: mean error"] > 10 * m[f"{KL}: mean error"],
            (f"{CONTROL}: mean error", f"{KL}: mean error"),
            main=False,
        ),
        Check(
            "energy-based marginals are accurate too",
            "KL and FM variants: mean error < 0.05 nats, in every seed",
            lambda m: max(m[f"{KL}: mean error"], m[f"{FM}: mean error"]) < 0.05,
            (f"{KL}: mean error", f"{FM}: mean error"),
            main=False,
        ),
        Check(
            "worse where training rarely goes",
            "maximum likelihood: mean error of the rarest tenth of the partial states more than twice that of the most "
            "probable tenth, in every seed",
            lambda m: m[f"{LIKELIHOOD}: rare tenth"] > 2 * m[f"{LIKELIHOOD}: frequent tenth"],
            (f"{LIKELIHOOD}: rare tenth", f"{LIKELIHOOD}: frequent tenth"),
            main=False,
        ),
        Check(
            "log Z is learned",
            "FM variant: the learned log Z within 0.05 nats of the exact one, in every seed",
            lambda m: abs(m[f"{FM}: log Z error"]) < 0.05,
            (f"{FM}: log Z error",),
            main=False,
        ),
    ),
    seeds=3,
)

EXACT = SPACE.log_marginals(WORLD.log_p)
FROM_RARE = EXACT.argsort()
TENTH = len(EXACT) // 10


def errors(name: str, found: Tensor) -> tuple[dict[str, float], dict[str, list[float]]]:
    """How far (N,) log-probabilities of the partial states are from the exact ones: numbers and stratified curves."""
    gap = (found - EXACT).abs()
    full = SPACE.complete
    values = {
        f"{name}: mean error": gap.mean().item(),
        f"{name}: max error": gap.max().item(),
        f"{name}: spearman": float(spearmanr(found, EXACT).statistic),
        f"{name}: spearman of whole vectors": float(spearmanr(found[full], EXACT[full]).statistic),
        f"{name}: error weighted by p": (gap * EXACT.exp()).sum().item() / 2**SPACE.dims,
        f"{name}: rare tenth": gap[FROM_RARE[:TENTH]].mean().item(),
        f"{name}: frequent tenth": gap[FROM_RARE[-TENTH:]].mean().item(),
    }
    by_size = [gap[SPACE.sizes == size].mean().item() for size in range(SPACE.dims + 1)]
    by_probability = [part.mean().item() for part in gap[FROM_RARE].tensor_split(20)]
    return values, {f"{name}: by size": by_size, f"{name}: by probability": by_probability}


@torch.no_grad()
def judge(name: str, model: AnyOrderMarginals) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Both networks in all partial states."""
    log_c = model.log_conditionals(SPACE.x, SPACE.known).double()
    values, curves = errors(name, (model.log_marginal(SPACE.x, SPACE.known) - model.log_normalizer()).double())
    values[f"{name}: divergence"] = SPACE.mean_order_kl(log_c, WORLD.log_p).item()
    values[f"{name}: divergence of the sampler"] = kl(SPACE.any_order(log_c)[SPACE.complete], WORLD.log_p).item()
    if name == LIKELIHOOD:
        more, further = errors(CHAIN, SPACE.chain(log_c))
        return values | more, curves | further
    return values, curves


@torch.no_grad()
def passes(model: AnyOrderMarginals) -> dict[str, float]:
    """Forward passes of either network for one vector, counted."""
    count = 0

    def called(*_: object) -> None:
        nonlocal count
        count += 1

    networks = (model.marginal_network, model.conditional_network)
    handles = [network.register_forward_hook(called) for network in networks]
    x = WORLD.configurations[:1]
    model.log_prob(x)
    marginal, count = count, 0
    model.order_log_prob(x, torch.arange(SPACE.dims))
    for handle in handles:
        handle.remove()
    return {"passes: marginal": float(marginal), "passes: chain rule": float(count)}


def measure(seed: int) -> Measured:
    def fresh() -> AnyOrderMarginals:
        return AnyOrderMarginals(SPACE.dims, 2, layers=LAYERS, width=WIDTH, seed=seed)

    values: dict[str, float] = {}
    curves: dict[str, Sequence[float]] = {}
    for name in TRAINED:
        model = fresh()
        if name == LIKELIHOOD:
            data = WORLD.sample(DATA, generator=torch.Generator().manual_seed(seed))
            config = MarginalsConfig(STEPS, STEPS, BATCH, LR, seed=seed)
            fit_marginals(model, data, config)
            values |= passes(model)
        else:
            objective = "flow_matching" if name == FM else "kl"
            alpha = 0.0 if name == CONTROL else ALPHA
            found = fit_energy(
                model, WORLD.log_density, EnergyConfig(objective, STEPS, BATCH, LR, alpha=alpha, seed=seed)
            )
            if found.log_normalizer is not None:
                values[f"{name}: log Z error"] = found.log_normalizer - WORLD.log_z
        numbers, drawn = judge(name, model)
        values |= numbers
        curves |= drawn
    return Measured(values, curves)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for number, name in enumerate((*TRAINED, CHAIN)):
        for seed, measured in enumerate(report.measured):
            label = None if seed else name
            style = {"color": f"C{number}", "alpha": 0.7, "label": label, "linewidth": 1}
            left.semilogy(
                range(1, SPACE.dims + 1), measured.curves[f"{name}: by size"][1:], "o-", markersize=3, **style
            )
            places = [part.mean().item() for part in EXACT[FROM_RARE].tensor_split(20)]
            right.semilogy(places, measured.curves[f"{name}: by probability"], "o-", markersize=3, **style)
    left.set(title="by known entries", xlabel="|S|", ylabel="mean |error of log p(x_S)|, nats")
    right.set(title="by probability", xlabel="exact log p(x_S)")
    left.legend(fontsize=7)


def notes(report: Report) -> list[str]:
    def by_size(name: str) -> str:
        curves = [measured.curves[f"{name}: by size"] for measured in report.measured]
        means = [statistics.fmean(curve[size] for curve in curves) for size in range(1, SPACE.dims + 1)]
        return ", ".join(f"{mean:.3f}" for mean in means)

    return [
        f"Rarely visited states are worse: mean error {report.range(f'{LIKELIHOOD}: rare tenth')} nats over the rarest "
        f"tenth of the partial states against {report.range(f'{LIKELIHOOD}: frequent tenth')} over the most probable "
        f"tenth; the largest error is {report.range(f'{LIKELIHOOD}: max error')}.",
        f"Mean error by |S| = 1 to 9: maximum likelihood {by_size(LIKELIHOOD)}; the chain rule of its conditionals "
        f"{by_size(CHAIN)}; KL {by_size(KL)}; FM {by_size(FM)}.",
        f"Spearman over all partial states mostly orders them by |S|; over whole vectors alone it is "
        f"{report.range(f'{LIKELIHOOD}: spearman of whole vectors', '.4g')}.",
        f"Weighted by p(x_S), mean over subsets, the error is {report.range(f'{LIKELIHOOD}: error weighted by p')} "
        f"nats (maximum likelihood), {report.range(f'{KL}: error weighted by p')} (KL), "
        f"{report.range(f'{FM}: error weighted by p')} (FM).",
        f"With alpha = 0 the marginals are off by {report.range(f'{CONTROL}: mean error')} nats and the conditionals, "
        f"which get no gradient then, by a divergence of {report.range(f'{CONTROL}: divergence')}.",
        f"KL(p_phi || p), mean over orders: {report.range(f'{LIKELIHOOD}: divergence')} (maximum likelihood), "
        f"{report.range(f'{KL}: divergence')} (KL), {report.range(f'{FM}: divergence')} (FM).",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
