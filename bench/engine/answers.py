"""Answers of a page, asked for as a run asks and found in the records, without models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.engine.records import NotAnswered, Record, RecordError, content_hash
from bench.engine.store import Answer, Store
from bench.engine.store_file import Entry, Page


class Answered:
    """Answers that are asked for as a run asks, and found without models.

    Args:
        entries: in the order of the page that shows them.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self.asked: dict[str, None] = {}  # keys in order

    def ask(
        self,
        question: Answer,
        work: Callable[[], Answer] = dict,
        *,
        rest: Callable[[], Answer] = dict,
        force: bool = False,
    ) -> Answer:
        """The answer of the page to a question; neither `work` nor `rest` is called.

        Args:
            question: a part of the question that no other answer of the page has.
            work: not needed.
            rest: not needed.
            force: not heeded.

        Raises:
            NotAnswered: the page shows no such answer.
        """
        found = self.select(**question)
        if not found:
            raise NotAnswered(f"the records of the page hold no answer to {question}; measure it first.")
        self.asked[found[0]["key"]] = None
        return found[0]

    def select(self, **question: Any) -> list[Answer]:
        """All answers of the page to questions with these parts, in the order of the page.

        Args:
            **question: the parts.
        """
        return [entry.flat for entry in self.entries if question.items() <= entry.question.items()]


class Shown(Answered):
    """What a page shows.

    Args:
        store: the file.
        page: of a profile.

    Raises:
        RecordError: an answer of the page is not in the file.
    """

    def __init__(self, store: Store, page: Page) -> None:
        missing = [key for key in page.keys if key not in store.entries]
        if missing:
            raise RecordError(f"{store.path} must hold all answers of its page, got none for {missing[0]}; restore it.")
        super().__init__([store.entries[key] for key in page.keys])
        self.store, self.page = store, page

    @property
    def records(self) -> list[Record]:
        """The entries of the page as records."""
        return [entry.record for entry in self.entries]

    @property
    def environments(self) -> dict[str, dict[str, Any]]:
        """The environment lines that the entries name, in the order in which they first do."""
        names = dict.fromkeys(entry.environment for entry in self.entries if entry.environment)
        return {name: self.store.environments[name] for name in names}

    @property
    def states(self) -> list[dict[str, Any]]:
        """What the environments of the page are, each once."""
        found = (line.get("environment", {}) for line in self.environments.values())
        return list({content_hash(state): state for state in found}.values())
