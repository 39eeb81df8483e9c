"""Conversations in SQLite, next to the run. A conversation is a tree: an edited question and an
answer that was made again are further branches, and nothing that was said is lost.

Several processes and threads may use a file at once (WAL). What a method has written is on the disk
when it returns.
"""

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import psutil

from manta.errors import DataError
from manta.terminal import line

APPLICATION = 0x4D414E54  # "MANT", in SQLite's header: which program a file belongs to
VERSION = 1
WAIT_SECONDS = 10.0  # for another process that writes
LONGEST_TITLE = 120

State = Literal["streaming", "complete", "stopped", "interrupted"]

TABLES = """
CREATE TABLE conversations (
  id INTEGER PRIMARY KEY,
  title TEXT NOT NULL,
  system TEXT NOT NULL DEFAULT '',
  leaf INTEGER,
  created REAL NOT NULL,
  updated REAL NOT NULL,
  deleted REAL
);
CREATE TABLE turns (
  id INTEGER PRIMARY KEY,
  conversation INTEGER NOT NULL REFERENCES conversations (id),
  parent INTEGER REFERENCES turns (id),
  role TEXT NOT NULL CHECK (role IN ('user', 'assistant')),
  text TEXT NOT NULL,
  state TEXT NOT NULL,
  writer TEXT,
  model TEXT,
  settings TEXT NOT NULL DEFAULT '{}',
  about TEXT NOT NULL DEFAULT '{}',
  ids TEXT NOT NULL DEFAULT '[]',
  tokens TEXT NOT NULL DEFAULT '[]',
  created REAL NOT NULL
);
CREATE INDEX of_conversation ON turns (conversation);
"""


class Conversations:
    """The conversations of a file. Close it in the end."""

    def __init__(self, file: Path):
        """Opens a file, or makes it.

        Raises:
            DataError: it is damaged, belongs to another program, or cannot be opened.
        """
        self.file = file
        self._lock = threading.RLock()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                file.touch(mode=0o600)
            self._open()
        except (sqlite3.Error, OSError) as e:
            raise DataError(
                f"{file}: cannot be opened as conversations ({line(str(e))}); move it away, and a "
                "new file is made"
            ) from None

    def _open(self) -> None:
        self._db = sqlite3.connect(
            self.file, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False
        )
        self._db.row_factory = sqlite3.Row
        with self._writing() as db:
            (application,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
            is_empty = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if application == 0 and is_empty:
                for statement in TABLES.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION}")
                db.execute(f"PRAGMA user_version = {VERSION}")
            elif application != APPLICATION:
                raise sqlite3.DatabaseError("it belongs to another program")
            elif version > VERSION:
                raise sqlite3.DatabaseError("a newer version of Manta wrote it")
        (found,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, of which all is written or nothing."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def stamp(self) -> str:
        """A text that is another one after each change by anybody."""
        with self._lock:
            (others,) = self._db.execute("PRAGMA data_version").fetchone()
            return f"{_writer()}-{others}-{self._db.total_changes}"

    def listed(self, search: str = "") -> list[dict[str, Any]]:
        """Conversations, the newest first; those that have `search` in a title or a turn."""
        like = "%" + "".join(f"\\{c}" if c in "\\%_" else c for c in search) + "%"
        with self._lock:
            rows = self._db.execute(
                "SELECT id, title, updated FROM conversations AS c WHERE deleted IS NULL AND"
                " (title LIKE :like ESCAPE '\\' OR EXISTS (SELECT 1 FROM turns WHERE"
                " conversation = c.id AND text LIKE :like ESCAPE '\\'))"
                " ORDER BY updated DESC, id DESC",
                {"like": like},
            ).fetchall()
        return [dict(row) for row in rows]

    def new(self, title: str = "", system: str = "") -> int:
        """Makes a conversation; returns its id."""
        now = time.time()
        with self._writing() as db:
            made = db.execute(
                "INSERT INTO conversations (title, system, created, updated) VALUES (?, ?, ?, ?)",
                (_title(title), system, now, now),
            )
        return int(made.lastrowid or 0)

    def get(self, conversation: int) -> dict[str, Any]:
        """A conversation with all its turns. Raises KeyError if there is none."""
        with self._lock:
            head = self._db.execute(
                "SELECT * FROM conversations WHERE id = ? AND deleted IS NULL", (conversation,)
            ).fetchone()
            if head is None:
                raise KeyError(conversation)
            rows = self._db.execute(
                "SELECT * FROM turns WHERE conversation = ? ORDER BY id", (conversation,)
            ).fetchall()
        return {**dict(head), "turns": [_turn(row) for row in rows]}

    def change(
        self,
        conversation: int,
        *,
        title: str | None = None,
        system: str | None = None,
        leaf: int | None = None,
    ) -> None:
        """Changes what is given. Raises KeyError if there is no such conversation or turn."""
        if leaf is not None:
            self.turn(conversation, leaf)
        given = {"title": title and _title(title), "system": system, "leaf": leaf}
        keys = [key for key, value in given.items() if value is not None]
        if not keys:
            return
        with self._writing() as db:
            found = db.execute(
                f"UPDATE conversations SET {', '.join(f'{key} = :{key}' for key in keys)},"
                " updated = :now WHERE id = :id AND deleted IS NULL",
                {**given, "now": time.time(), "id": conversation},
            )
            if not found.rowcount:
                raise KeyError(conversation)

    def delete(self, conversation: int, *, undo: bool = False) -> None:
        """Deletes a conversation, which `undo` takes back. Its turns stay in the file. Raises
        KeyError if there is none."""
        with self._writing() as db:
            found = db.execute(
                "UPDATE conversations SET deleted = ? WHERE id = ?",
                (None if undo else time.time(), conversation),
            )
            if not found.rowcount:
                raise KeyError(conversation)

    def turn(self, conversation: int, turn: int) -> dict[str, Any]:
        """A turn. Raises KeyError if the conversation has none of this id."""
        with self._lock:
            row = self._db.execute(
                "SELECT * FROM turns WHERE id = ? AND conversation = ?", (turn, conversation)
            ).fetchone()
        if row is None:
            raise KeyError(turn)
        return _turn(row)

    def ask(self, conversation: int, parent: int | None, text: str) -> int:
        """Adds a question after the answer `parent`, or at the start; returns its id. Raises
        KeyError if there is no such conversation or answer."""
        return self._add(conversation, parent, "user", text, "complete", None, {})

    def answer(self, conversation: int, parent: int, model: str, settings: dict[str, Any]) -> int:
        """Adds an empty answer to the question `parent`; returns its id. It counts as stopped until
        `go_on` says that it is being written, and `write` fills it. Raises KeyError if there is no
        such conversation or question."""
        return self._add(conversation, parent, "assistant", "", "stopped", model, settings)

    def _add(
        self,
        conversation: int,
        parent: int | None,
        role: str,
        text: str,
        state: State,
        model: str | None,
        settings: dict[str, Any],
    ) -> int:
        before = None if parent is None else self.turn(conversation, parent)["role"]
        if before == role or (before is None and role == "assistant"):
            raise KeyError(parent)
        now = time.time()
        with self._writing() as db:
            there = db.execute(
                "SELECT title FROM conversations WHERE id = ? AND deleted IS NULL", (conversation,)
            ).fetchone()
            if there is None:
                raise KeyError(conversation)
            made = db.execute(
                "INSERT INTO turns (conversation, parent, role, text, state, writer, model,"
                " settings, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (conversation, parent, role, text, state, _writer(), model,
                 json.dumps(settings), now),
            )  # fmt: skip
            title = there["title"] or (_title(text) if role == "user" else "")
            db.execute(
                "UPDATE conversations SET leaf = ?, updated = ?, title = ? WHERE id = ?",
                (made.lastrowid, now, title, conversation),
            )
        return int(made.lastrowid or 0)

    def go_on(self, conversation: int, turn: int) -> None:
        """Opens an answer again that ended before its time; `write` goes on with it. Raises
        KeyError if there is none, or somebody writes it."""
        found = self.turn(conversation, turn)
        if found["role"] != "assistant" or found["state"] == "streaming":
            raise KeyError(turn)
        with self._writing() as db:
            db.execute(
                "UPDATE turns SET state = 'streaming', writer = ? WHERE id = ?", (_writer(), turn)
            )
            db.execute(
                "UPDATE conversations SET leaf = ?, updated = ? WHERE id = ?",
                (turn, time.time(), conversation),
            )

    def write(
        self,
        turn: int,
        text: str,
        state: State,
        *,
        tokens: list[Any] | None = None,
        ids: tuple[int, ...] = (),
        about: dict[str, Any] | None = None,
    ) -> None:
        """Writes an answer as far as it has come."""
        with self._writing() as db:
            db.execute(
                "UPDATE turns SET text = ?, state = ?, tokens = coalesce(?, tokens), ids = ?,"
                " about = coalesce(?, about) WHERE id = ?",
                (text, state, None if tokens is None else json.dumps(tokens), json.dumps(ids),
                 None if about is None else json.dumps(about), turn),
            )  # fmt: skip
            db.execute(
                "UPDATE conversations SET updated = ? WHERE id ="
                " (SELECT conversation FROM turns WHERE id = ?)",
                (time.time(), turn),
            )

    def path(self, conversation: int, leaf: int | None) -> list[dict[str, Any]]:
        """The turns from the start to `leaf`. Raises KeyError if there is no such turn."""
        every = {turn["id"]: turn for turn in self.get(conversation)["turns"]}
        found: list[dict[str, Any]] = []
        while leaf is not None:
            found.append(every[leaf])
            leaf = every[leaf]["parent"]
        return found[::-1]

    def export(self, conversation: int | None = None) -> Iterator[dict[str, Any]]:
        """Conversations as rows that jobs/finetune.py takes: the branch that is shown of each, up
        to its last answer, or to the one before an empty text, which cannot be learnt. Raises
        KeyError if there is no such conversation."""
        every = [conversation] if conversation is not None else [c["id"] for c in self.listed()]
        for each in every:
            head = self.get(each)
            messages = []
            for turn in self.path(each, head["leaf"]):
                if not turn["text"].strip() or turn["state"] == "streaming":
                    break
                messages.append({"role": turn["role"], "content": turn["text"]})
            if messages and messages[-1]["role"] == "user":
                messages.pop()
            if not messages:
                continue
            if head["system"].strip():
                messages.insert(0, {"role": "system", "content": head["system"]})
            yield {"messages": messages}


def _title(text: str) -> str:
    return line(" ".join(text.split()), LONGEST_TITLE)


def _turn(row: sqlite3.Row) -> dict[str, Any]:
    found = dict(row)
    writer = found.pop("writer")
    for key in ("settings", "about", "ids", "tokens"):
        found[key] = json.loads(found[key])
    if found["state"] == "streaming" and not _is_alive(writer):
        found["state"] = "interrupted"
    return found


def _writer() -> str:
    """This process, by its id and when it began: another one may have the id later, and in a
    container it does."""
    return f"{os.getpid()}:{psutil.Process().create_time()}"


def _is_alive(writer: str | None) -> bool:
    """Whether a process of this machine still runs."""
    number, _, began = (writer or "").partition(":")
    try:
        process = psutil.Process(int(number))
        return process.status() != psutil.STATUS_ZOMBIE and str(process.create_time()) == began
    except (psutil.Error, ValueError):
        return False
