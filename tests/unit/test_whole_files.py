"""A file that others read is there whole, old or new, whatever happens to whoever writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefarena.stages import whole_file


def test_the_file_is_there_when_the_block_ends_and_as_it_was_until_then(tmp_path: Path) -> None:
    path = tmp_path / "numbers.npz"
    path.write_text("old")
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == path.suffix  # by which numpy and others decide on a format
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "numbers.npz"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
