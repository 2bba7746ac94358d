"""The support matrix: the page is the table's, every tested cell has a test, and the rest is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity import test_parity, test_support
from toolkit.cli import main
from toolkit.config import StrategyConfig
from toolkit.data.loader import batch_shape
from toolkit.errors import ConfigError
from toolkit.matrix import markdown
from toolkit.precision import Precision
from toolkit.strategies import MATRIX, STRATEGIES, choose_low_bit
from toolkit.strategies.support import REFUSALS
from toolkit.world import world

PAGE = Path(__file__).parents[2] / "docs" / "support-matrix.md"


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "toolkit matrix --markdown > docs/support-matrix.md"


def test_every_tested_cell_is_enrolled() -> None:
    tested = {(cell.strategy, cell.quantization, cell.adapter) for cell in MATRIX if cell.tested}
    enrolled = {(cell.strategy, cell.quantization, cell.adapter) for cell in test_support.CELLS}
    enrolled |= {(name, "none", "none") for name, _ in test_parity.LAYOUTS}
    # tests/unit/test_diloco.py trains all weights.
    enrolled |= {("diloco", "none", adapter) for adapter in ("none", *test_support.UNDER_DILOCO)}
    assert enrolled == tested
    assert len(tested) == 120 + 56


def test_every_refusal_speaks_for_some_cell() -> None:
    assert {cell.refusal for cell in MATRIX if cell.refusal} == set(REFUSALS)
    assert len(MATRIX) == len(STRATEGIES) * 6 * 9


@pytest.mark.parametrize("cell", [cell for cell in MATRIX if cell.refusal], ids=str)
def test_what_is_refused(cell: test_support.Cell) -> None:
    strategy = STRATEGIES[cell.strategy](
        cell.strategy,
        StrategyConfig(),
        world=world(),
        precision=Precision("fp32"),
        shape=batch_shape(8, None, 1),
        max_grad_norm=1.0,
    )
    with pytest.raises(ConfigError, match=f"--quantization {cell.quantization} with") as caught:
        choose_low_bit(strategy, cell.quantization, cell.adapter)
    assert cell.strategy in caught.value.message
    assert cell.refusal
    assert caught.value.message.endswith(cell.refusal.reason)
    assert caught.value.remedy


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["matrix"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for word in (*STRATEGIES, "nf4-double", "refused", "lora, rslora, dora, ia3", "FSDP2 puts parameters of its own"):
        assert word in said
    assert main(["matrix", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown()
