"""The lens agrees with an independent float64 computation: Transformers' logits, a softmax, and the formulas by
hand."""

from __future__ import annotations

import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from megatron_chord.config_methods import (
    ClippedISWeight,
    EntropyTopWeight,
    MarginWeight,
    PowerWeight,
    SimpleWeight,
    TokenWeight,
    TrustRegionWeight,
)
from megatron_chord.data.lens import Lens, compute_lens, load_policy
from megatron_chord.data.lens_page import lens_section
from megatron_chord.data.lens_screen import show_lens
from megatron_chord.data.observed import Observed
from megatron_chord.data.templates import ChatTemplate, load_template
from megatron_chord.losses.sft import sft_term
from tests.support.task import save_policy

ROWS = [("1 + 1 =", "It is #### 2"), ("20 + 7 =", "#### 27"), ("<b>?", "<i>\n& no")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    save_policy(path)
    return path


@pytest.fixture(scope="module")
def template(folder: Path) -> ChatTemplate:
    return load_template(folder)


@pytest.fixture(scope="module")
def rows(template: ChatTemplate) -> list[Observed]:
    seen = []
    for number, (question, answer) in enumerate(ROWS, start=1):
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        ids, trainable = template.demonstration(messages)
        seen.append(
            Observed(
                file="d",
                number=number,
                messages=messages,
                token_ids=ids,
                trainable=trainable,
                is_overlong=False,
            )
        )
    return seen


@pytest.fixture(scope="module")
def model(folder: Path, rows: list[Observed]) -> Any:
    """A policy for which some demonstration tokens are probable and others are not."""
    model = load_policy(folder)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        seen = rows[0]
        logits = model(torch.tensor([seen.token_ids])).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(seen.token_ids[1:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def lens_of(
    model: Any, template: ChatTemplate, rows: list[Observed], weight: TokenWeight, **how: Any
) -> Lens:
    return compute_lens(
        model, template, rows, sft_term(weight=weight, **how), policy="<policy>", weighting="<w>"
    )


def distributions(model: Any, rows: list[Observed], temperature: float = 1.0) -> list[np.ndarray]:
    """The policy's float64 distributions [K, V] before each trained token."""
    import copy

    double = copy.deepcopy(model).double()
    found = []
    for seen in rows:
        with torch.no_grad():
            logits = double(torch.tensor([seen.token_ids])).logits[0]
        positions = [i for i, trained in enumerate(seen.trainable) if trained]
        found.append(torch.softmax(logits[[i - 1 for i in positions]] / temperature, -1).numpy())
    return found


def targets(seen: Observed) -> list[int]:
    return [token for token, trained in zip(seen.token_ids, seen.trainable, strict=True) if trained]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_p_phi_weight_and_share(
    model: Any, template: ChatTemplate, rows: list[Observed], temperature: float
) -> None:
    lens = lens_of(model, template, rows, SimpleWeight(kind="phi"), temperature=temperature)
    assert lens.all("p").min() < 0.02
    assert lens.all("p").max() > 0.6
    for row, seen, q in zip(lens.rows, rows, distributions(model, rows, temperature), strict=True):
        p = q[np.arange(len(q)), targets(seen)]
        np.testing.assert_allclose(row.p, p, rtol=2e-4)
        np.testing.assert_allclose(row.phi, p * (1 - p), rtol=2e-4)
        np.testing.assert_allclose(row.weight, p * (1 - p), rtol=2e-4)
        # dL/dlogits = weight (softmax - onehot), L1 norm over the vocabulary
        onehot = np.eye(q.shape[1])[targets(seen)]
        norms = np.abs((p * (1 - p))[:, None] * (q - onehot)).sum(1)
        np.testing.assert_allclose(row.share, norms / norms.sum(), rtol=1e-3, atol=1e-7)
        assert row.share.sum() == pytest.approx(1)


def test_other_weights_and_a_cutoff(model: Any, template: ChatTemplate, rows: list[Observed]) -> None:
    q = distributions(model, rows)
    p = np.concatenate([d[np.arange(len(d)), targets(seen)] for d, seen in zip(q, rows, strict=True)])
    rest = np.concatenate(q).copy()
    rest[np.arange(len(rest)), np.concatenate([targets(seen) for seen in rows])] = 0
    entropy = -np.concatenate([(d * np.log(d)).sum(1) for d in q])
    top = np.sort(entropy)[-int(np.ceil(0.25 * len(entropy)))]
    cases: list[tuple[TokenWeight, dict[str, float], np.ndarray]] = [
        (SimpleWeight(kind="one"), {}, np.ones_like(p)),
        (SimpleWeight(kind="p"), {"cutoff": 0.3}, np.where(p > 0.3, 0, p)),
        (PowerWeight(a=2, b=0.5, scale=3), {}, 3 * p**2 * (1 - p) ** 0.5),
        (ClippedISWeight(threshold=0.2), {}, np.where(p <= 0.2, p, 0)),
        (TrustRegionWeight(threshold=0.2), {}, np.minimum(p / 0.2, 1)),
        (MarginWeight(), {}, 1 - np.abs(p - rest.max(1))),
        (EntropyTopWeight(share=0.25), {}, (entropy >= top).astype(float)),
    ]
    for weight, how, expected in cases:
        lens = lens_of(model, template, rows, weight, **how)
        np.testing.assert_allclose(lens.all("weight"), expected, rtol=5e-4, atol=1e-7, err_msg=str(weight))


def test_the_summary_is_over_all_rows(model: Any, template: ChatTemplate, rows: list[Observed]) -> None:
    lens = lens_of(model, template, rows, SimpleWeight(kind="phi"))
    q = distributions(model, rows)
    p = np.concatenate([d[np.arange(len(d)), targets(seen)] for d, seen in zip(q, rows, strict=True)])
    dropped = (p > 0.99) | (p < 0.01)
    assert 0 < dropped.mean() < 1
    assert lens.dropped == pytest.approx(dropped.mean())
    known, learned, surprising = lens.classes()
    assert learned.tokens == pytest.approx(1 - dropped.mean())
    assert surprising.plain == pytest.approx((1 - p)[p < 0.01].sum() / (1 - p).sum(), rel=1e-3)
    pull = p * (1 - p) ** 2
    assert surprising.weighted == pytest.approx(pull[p < 0.01].sum() / pull.sum(), rel=1e-3)
    for name in ("tokens", "plain", "weighted"):
        assert sum(getattr(one, name) for one in (known, learned, surprising)) == pytest.approx(1)


def test_the_page_has_the_numbers_of_each_token(
    model: Any, template: ChatTemplate, rows: list[Observed]
) -> None:
    lens = lens_of(model, template, rows, SimpleWeight(kind="phi"))
    anchor, _, html = lens_section(lens, shown=3)
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("policy", "w", "b", "i") or not dict(attrs).get("data-p")
            if value := dict(attrs).get("data-p"):
                found.append(value)

    Reader().feed(html)
    assert anchor == "lens"
    assert "&lt;policy&gt;" in html
    assert "<policy>" not in html
    numbers = np.array([list(map(float, value.split())) for value in found])
    np.testing.assert_allclose(numbers[:, 0], lens.all("p"), rtol=1e-5)
    np.testing.assert_allclose(numbers[:, 2], lens.all("weight"), rtol=1e-5)


def test_the_terminal_shows_it_with_and_without_colours(
    model: Any, template: ChatTemplate, rows: list[Observed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    lens = lens_of(model, template, rows, SimpleWeight(kind="phi"))
    plain, coloured = io.StringIO(), io.StringIO()
    show_lens(lens, Console(file=plain, width=120), shown=1)
    show_lens(lens, Console(file=coloured, force_terminal=True, color_system="truecolor", width=120), shown=1)
    assert "\x1b" not in plain.getvalue()
    assert f"phi drops {lens.dropped:.0%} of the tokens" in plain.getvalue()
    assert "48;2;" in coloured.getvalue()


def test_a_policy_that_cannot_score_the_rows_is_refused(
    model: Any, template: ChatTemplate, rows: list[Observed], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="none: no such folder"):
        load_policy(tmp_path / "none")
    with pytest.raises(ValueError, match="no model can be loaded"):
        load_policy(tmp_path)
    beyond = Observed(
        file="d",
        number=9,
        messages=rows[0].messages,
        token_ids=(1, 9999),
        trainable=(False, True),
        is_overlong=False,
    )
    with pytest.raises(ValueError, match="d:9 has token 9999, the model has 259"):
        lens_of(model, template, [beyond], SimpleWeight(kind="one"))
