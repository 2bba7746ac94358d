"""Conversations: from rows of any layout to tokens, with what of them is learnt."""

from toolkit.data.chat.encode import answer_end, question, use_template
from toolkit.data.chat.pairs import answer_pairs, preferences
from toolkit.data.chat.prepare import chat
from toolkit.data.chat.rows import conversations

__all__ = ["answer_end", "answer_pairs", "chat", "conversations", "preferences", "question", "use_template"]
