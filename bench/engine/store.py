"""The store of results: one file of JSON lines for each task, appended to, so that a killed run loses only what it did.

Every line has a schema version, a kind and a digest of the rest, so that an edited line is noticed. Kinds:

- `environment`, once a run that measured something: machine, versions, commit;
- `block`: what all answers about one attention block share, in the question and in the answer;
- `answer`: a question, its key (the hash of the question), the answer, and the id of the environment it was made in;
- `page`: the keys of the answers that the page of a profile shows, in order: it can be made again from the file.

Of several answers with one key, and of several pages of one profile, the last one counts.
"""

from __future__ import annotations

import contextlib
import dataclasses as dc
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.engine.appending import opened, repair
from bench.engine.machine import environment
from bench.engine.records import NotAnswered, Record, RecordError, content_hash
from bench.engine.store_file import Entry, Page, ResultsFile, read
from lipbounds.files import write_atomically


Answer = dict[str, Any]


class Store:
    """A file of results open for appending, locked against a second writer; a torn last line is cut off on opening.

    Over 150 lines, because reading, asking and writing share the file, its lock and what it holds.

    Args:
        path: of the file; it and its folder are made if missing.
        started_by: the command line, for the environment line.
        only_read: leave the file and its folder as they are.

    Raises:
        RecordError: another run has the file open; it is no file, cannot be read or written, or holds something else.
    """

    def __init__(self, path: Path, *, started_by: str = "", only_read: bool = False) -> None:
        self.path, self.started_by, self.only_read = path, started_by, only_read
        self.made = self.reused = 0
        self.asked: dict[str, None] = {}  # keys of this run in order
        self.fresh: set[str] = set()  # keys of what was made in this run
        self.repaired = ""
        self._ids: dict[str, str] = {}
        self._file: int | None = None
        with _told(path):
            if not only_read:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = opened(path)
            try:
                self._contents = read(path)
                if self._file is not None:
                    self.repaired = repair(path, self._file, self._contents.torn)
            except BaseException:
                self.close()
                raise

    @property
    def entries(self) -> dict[str, Entry]:
        """The latest entry of each key."""
        return self._contents.entries

    @property
    def environments(self) -> dict[str, dict[str, Any]]:
        """Environment lines by id."""
        return self._contents.environments

    @property
    def pages(self) -> dict[str, Page]:
        """What is shown, by the names of pages."""
        return self._contents.pages

    def record(self, key: str) -> Record | None:
        """The entry of that key as a record; None if there is none.

        Args:
            key: of a question about a block.
        """
        entry = self.entries.get(key)
        return None if entry is None else entry.record

    def tokens(self) -> dict[tuple[str, str], int]:
        """The number of tokens of the inputs that the records know, by the hashes of the model and the input."""
        known = self._contents.blocks.values()
        return {(asked["model_hash"], asked["input_hash"]): about["tokens"] for asked, about in known if about}

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other runs open the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to another process: what is known, and no right to write."""
        return {**self.__dict__, "_file": None, "only_read": True}

    def ask(
        self,
        question: Answer,
        work: Callable[[], Answer],
        *,
        rest: Callable[[], Answer] = dict,
        force: bool = False,
    ) -> Answer:
        """The answer to a question: from the file, or made now and appended.

        Args:
            question: what tells the answer from the others of its page, ready for JSON.
            work: makes the answer.
            rest: what else the answer depends on, such as hashes and versions; the key is the hash of both.
            force: make it again, unless this run has made it.

        Raises:
            NotAnswered: it is not in the file, which is only read.
        """
        question = {**rest(), **question}
        key = content_hash(question)
        known = self.entries.get(key)
        if known is not None and not (force and key not in self.fresh):
            self.reused += key not in self.asked and key not in self.fresh
            self.asked[key] = None
            return known.flat
        if self.only_read:
            raise NotAnswered(f"{self.path} has no answer to {question}.")
        entry = Entry(question=question, answer=work(), environment=self.environment_of(environment()))
        self.append(entry)
        self.asked[key] = None
        return entry.flat

    def append(self, entry: Entry | Record) -> None:
        """Write an entry to disk; the latest of a key is the one that counts."""
        entry = Entry.of(entry) if isinstance(entry, Record) else entry
        self._write(self._contents.lines(entry))
        self._contents.put(entry)
        self.fresh.add(entry.key)
        self.made += 1

    def adopt(self, entry: Entry, line: dict[str, Any]) -> None:
        """Write an entry that another process made.

        Args:
            entry: as it came.
            line: what its environment line says there.
        """
        self.append(dc.replace(entry, environment=self.environment_of(line["environment"])))

    def know(self, other: Store) -> None:
        """Take over the answers of another file, without writing them.

        Args:
            other: that file.
        """
        self._contents.entries.update(other.entries)

    def environment_of(self, state: dict[str, Any], **declared: Any) -> str:
        """The id of the line of an environment, written with its first entry: a run that adds nothing leaves none.

        Args:
            state: what `bench.engine.machine.environment` returned.
            **declared: what else the line says.
        """
        known = content_hash(state)
        if known not in self._ids:
            started = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._ids[known] = self.add_environment(
                {"started": started, "command": self.started_by, "environment": state, **declared}
            )
        return self._ids[known]

    def add_environment(self, description: dict[str, Any]) -> str:
        """Write an environment line and return its id.

        Args:
            description: anything JSON can hold.
        """
        identity, lines = self._contents.environment_lines(description)
        self._write(lines)
        return identity

    def show(self, place: str, keys: Iterable[str], **data: Any) -> Page:
        """Keep what a page shows; the file is left alone if that is known.

        Args:
            place: name of the page.
            keys: of the answers, in the order of the page.
            **data: what the page says beside them.
        """
        page = Page(keys=list(dict.fromkeys(keys)), data=data)
        if self.pages.get(place) != page:
            self._write(self._contents.page_lines(place, page))
        return page

    def compact(self) -> None:
        """Rewrite the file without what a later line replaces and environments no entry names, if there is such."""
        if not self._contents.superfluous:
            return
        kept = ResultsFile()
        lines = self._contents.all_lines(kept)
        with _told(self.path):
            write_atomically(self.path.resolve(), "".join(f"{line}\n" for line in lines).encode())
            self.close()
            self._file = opened(self.path)
        self._contents = kept

    def _write(self, lines: Iterable[str]) -> None:
        """Whole lines in one write, on disk before this returns."""
        content = "".join(f"{line}\n" for line in lines).encode()
        if self._file is None:
            raise RecordError(f"{self.path} is only read, and cannot be added to.")
        with _told(self.path):
            size = os.fstat(self._file).st_size
            try:
                written = os.write(self._file, content)
                if written < len(content):
                    raise OSError(f"only {written} of {len(content)} bytes could be written; is the disk full?")
                os.fsync(self._file)
            except OSError:  # nothing may follow half a line; where even this fails, the next run cuts it off
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, size)
                raise


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Errors of the file system as ours, with what to do."""
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"{path} must be a file that can be read and written, got '{error.strerror or error}'; what was written "
            "before is kept: make room or pass another --results folder, and run the same command again."
        ) from error
