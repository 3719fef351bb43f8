"""Drawing in two launches against `Likelihoods` and against float64, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch
from msgspec import Struct

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.engine import SamplingParams  # noqa: E402
from rollmill.engine.llm import sampler  # noqa: E402
from rollmill.engine.llm.gpu.sampling import draw, score  # noqa: E402 (after the conftest's set-up)
from rollmill.engine.llm.likelihoods import Likelihoods  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def logits_of(batch: int, vocab: int, dtype: torch.dtype, scale: float = 3.0) -> torch.Tensor:
    wide = torch.randn(batch, vocab + 24, generator=torch.Generator().manual_seed(vocab)) * scale
    return wide.to(dtype).to(DEVICE)[:, :vocab]  # rows lie further apart than they are long


def draw_all(logits: torch.Tensor, temperatures: list[float], uniforms: list[float]) -> tuple[torch.Tensor, ...]:
    ids, values = draw(
        logits,
        torch.tensor(temperatures, dtype=torch.float32, device=DEVICE),
        torch.tensor(uniforms, dtype=torch.float64, device=DEVICE),
    )
    assert torch.equal(ids.double(), values[0])
    return ids.cpu(), values[1].cpu()


@dtypes
@pytest.mark.parametrize("vocab", [5, 256, 4096, 4097, 10007])
def test_tokens_and_logprobs(vocab: int, dtype: torch.dtype):
    logits = logits_of(4, vocab, dtype)
    temperatures, uniforms = [1.0, 0.5, 2.0, 1.0], [0.1, 0.5, 0.999999, 0.0]
    ids, logprobs = draw_all(logits, temperatures, uniforms)
    scaled = logits.cpu().float() / torch.tensor(temperatures)[:, None]
    expected = scaled.double().log_softmax(-1)
    cdf = expected.exp().cumsum(-1)
    for row, (id, uniform) in enumerate(zip(ids.tolist(), uniforms, strict=True)):
        before = float(cdf[row, id - 1]) if id else 0.0
        assert before - 1e-6 <= uniform <= float(cdf[row, id]) + 1e-6
    torch.testing.assert_close(logprobs, expected.gather(-1, ids[:, None])[:, 0], rtol=0, atol=2e-6)
    same = Likelihoods(scaled).draw(torch.tensor(uniforms, dtype=torch.float64))
    assert (same == ids).sum() >= 3  # a number next to a border may fall on its other side


def test_frequencies():
    """As many draws of every token as its probability says, for numbers spread evenly."""
    logits = logits_of(1, 300, torch.float32, scale=1.0)
    count = 400
    ids, _ = draw_all(logits.expand(count, -1), [1.0] * count, [(i + 0.5) / count for i in range(count)])
    found = ids.bincount(minlength=300) / count
    assert (found - logits.cpu()[0].softmax(-1)).abs().max() <= 1.01 / count


@dtypes
def test_the_likeliest_and_the_first_of_equals(dtype: torch.dtype):
    logits = logits_of(3, 9000, dtype)
    logits[0, [8999, 17, 4500]] = 50.0
    logits[1, [5000, 4999]] = 50.0
    ids, logprobs = draw_all(logits, [1.0, 0.5, 1.0], [-1.0] * 3)
    assert ids.tolist() == [17, 4999, int(logits[2].argmax())]
    torch.testing.assert_close(logprobs[:2], -torch.tensor([3.0, 2.0]).double().log(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2.0**-53])
def test_what_has_no_probability_is_never_drawn(uniform: float):
    logits = torch.full((1, 9000), -torch.inf, device=DEVICE)
    logits[0, [300, 301, 8191]] = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    ids, logprobs = draw_all(logits, [1.0], [uniform])
    assert ids.item() in (300, 301, 8191)
    assert bool(logprobs.isfinite())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("uniform", [0.4, -1.0], ids=["drawn", "greedy"])
def test_rows_without_a_distribution_give_nan_and_touch_no_other(value: float, uniform: float):
    logits = logits_of(3, 5000, torch.float32)
    expected = draw_all(logits, [1.0] * 3, [uniform] * 3)
    if value == -torch.inf:
        logits[1] = value
    else:
        logits[1, 4321] = value
    ids, logprobs = draw_all(logits, [1.0] * 3, [uniform] * 3)
    assert bool(logprobs[1].isnan())
    assert 0 <= ids[1] < 5000
    for row in (0, 2):
        assert (ids[row], logprobs[row]) == (expected[0][row], expected[1][row])


def test_a_row_does_not_depend_on_its_company():
    logits = logits_of(7, 5000, torch.bfloat16)
    together = draw_all(logits, [0.7] * 7, [0.3] * 7)
    for row in (0, 6):
        alone = draw_all(logits[row : row + 1], [0.7], [0.3])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))


class Row(Struct):
    """A request, as the sampler sees it."""

    params: SamplingParams
    number: float = 0.3
    prompt: tuple[int, ...] = (1,)
    new_tokens: tuple[int, ...] = ()

    def uniform(self) -> float:
        return self.number


PLAIN = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.5, logprobs="processed"),
    SamplingParams(logprobs="raw"),
]
WIDE = [
    SamplingParams(temperature=0.5, logprobs="raw"),
    SamplingParams(top_p=0.9),
    SamplingParams(top_logprobs=2),
    SamplingParams(sampling_mask=True),
    SamplingParams(logit_bias={3: 1.0}),
]


def test_the_sampler_takes_the_kernels_where_they_are_enough(monkeypatch: pytest.MonkeyPatch):
    logits = logits_of(len(PLAIN), 5000, torch.float32)
    rows = [Row(params) for params in PLAIN]
    monkeypatch.setattr(sampler, "has_kernels", lambda x: False)
    expected = sampler.sample(logits, rows).read()
    monkeypatch.setattr(sampler, "has_kernels", lambda x: True)
    monkeypatch.setattr(sampler, "Likelihoods", None)
    for found, other in zip(sampler.sample(logits, rows).read(), expected, strict=True):
        assert (found.token, found.top, found.mask) == (other.token, None, None)
        assert abs(found.logprob - other.logprob) < 2e-6
    for params in WIDE:
        with pytest.raises(TypeError, match="NoneType"):  # the way without kernels
            sampler.sample(logits, [*rows[:-1], Row(params)])


@dtypes
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_the_bits_of_drawn_tokens(dtype: torch.dtype, temperature: float):
    logits = logits_of(6, 10007, dtype)
    ids, logprobs = draw_all(logits, [temperature] * 6, [0.1, 0.3, 0.5, 0.7, 0.9, -1.0])
    temperatures = torch.full((6,), temperature, device=DEVICE)
    assert torch.equal(score(logits, temperatures, ids.to(DEVICE)).cpu(), logprobs)
    assert torch.equal(score(logits[2:3], temperatures[:1], ids[2:3].to(DEVICE)).cpu(), logprobs[2:3])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_with_and_without_kernels(monkeypatch: pytest.MonkeyPatch, temperature: float):
    logits, ids = logits_of(3, 5000, torch.bfloat16), torch.tensor([7, 4999, 0], device=DEVICE)
    found = {}
    for kernels in (False, True):
        monkeypatch.setattr(sampler, "has_kernels", lambda x, kernels=kernels: kernels)
        found[kernels] = sampler.score(logits, temperature, ids)
        assert found[kernels].dtype == torch.float32
    torch.testing.assert_close(found[True], found[False], rtol=0, atol=2e-6)


def test_requests_drawn_apart(monkeypatch: pytest.MonkeyPatch):
    """Each as if it were alone: a plain one by the kernel, whoever else is there. Log-probs are those of `score`."""
    params = [PLAIN[0], SamplingParams(temperature=0.7, top_p=0.8), *WIDE]
    logits, rows = logits_of(len(params), 5000, torch.bfloat16), [Row(one) for one in params]
    monkeypatch.setattr(sampler, "has_kernels", lambda x: True)
    apart = sampler.sample(logits, rows, apart=True)
    assert apart.ids.tolist() == [draw.token for draw in apart.read()]
    for i, (row, found) in enumerate(zip(rows, apart.read(), strict=True)):
        alone = sampler.sample(logits[i : i + 1], [row]).read()[0]
        assert found.token == alone.token
        assert abs(found.logprob - alone.logprob) < 2e-6
        temperature = 1.0 if row.params.logprobs == "raw" else row.params.temperature
        again = sampler.score(logits[i : i + 1], temperature, torch.tensor([found.token], device=DEVICE))
        assert torch.tensor(found.logprob, dtype=torch.float32) == again.cpu()
