"""How training is laid over the ranks. One file for each strategy; `choose_strategy` picks one."""

from toolkit.strategies.base import Layout, Strategy, Update
from toolkit.strategies.choose import STRATEGIES, choose_strategy
from toolkit.strategies.support import MATRIX, choose_low_bit

__all__ = ["MATRIX", "STRATEGIES", "Layout", "Strategy", "Update", "choose_low_bit", "choose_strategy"]
