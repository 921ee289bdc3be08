"""New weights on their way to generators that may be lost: what is asked for, how often, and by whom."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefarena.config import Generation
from prefarena.generation.interface import GeneratorLostError, TransferLostError
from prefarena.generation.transfer import Feed
from prefarena.training.policy_source import PolicySource
from prefarena.training.worker import Worker

NAMES = ("a", "b", "c")


class Policy:
    """Notes which tensors were made, in each sending."""

    changing = None

    def __init__(self) -> None:
        self.made: list[list[str]] = []

    def weights(self, *, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        self.made.append([])
        for name in NAMES:
            self.made[-1].append(name)
            yield name, torch.zeros(2)


class Losing:
    """A source between devices of which an engine is lost in the first `times` sendings, at the second tensor."""

    def __init__(self, times: int) -> None:
        self.times, self.version = times, ""

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: str) -> None:
        feed = Feed(named_tensors)
        taken = []
        for name, _ in feed:
            taken.append(name)
            if len(taken) == 2 and self.times:
                self.times -= 1
                feed.give_up()
                raise TransferLostError("an engine died")
        self.version = version

    def submit(self, *_: Any) -> Any:
        raise NotImplementedError

    generate = submit


def source_over(generators: Losing, policy: Policy, folder: Path) -> PolicySource:
    return PolicySource("rlhf", Generation(), Worker(str(folder)), generators, policy)


def test_weights_of_which_a_part_was_lost_are_made_and_sent_again(tmp_path: Path) -> None:
    generators, policy = Losing(2), Policy()
    source_over(generators, policy, tmp_path).push(7)
    assert generators.version == "rlhf@7"
    assert policy.made == [[*NAMES]] * 3  # each time all of them, so that workers that only gather keep in step


def test_generators_that_are_lost_in_every_sending_end_the_training(tmp_path: Path) -> None:
    policy = Policy()
    with pytest.raises(
        GeneratorLostError, match=r"^weights 'rlhf@0' were sent 4 times, and each time a generator was lost on the way$"
    ):
        source_over(Losing(9), policy, tmp_path).push(0)
    assert policy.made == [[*NAMES]] * 4


def test_nothing_is_made_before_it_is_asked_for() -> None:
    policy = Policy()
    feed = Feed(policy.weights())
    tensors = iter(feed)
    assert policy.made == [] and not feed.begun
    assert next(tensors)[0] == "a" and policy.made == [["a"]] and feed.begun
    assert [name for name, _ in tensors] == ["b", "c"]


def test_who_gives_an_update_up_waits_for_the_tensor_that_is_being_made_and_takes_the_rest() -> None:
    """The thread that sends may be gathering, which cannot be done by two at once."""
    making, go_on = threading.Event(), threading.Event()
    made: list[str] = []

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in NAMES:
            if name == "b":
                making.set()
                assert go_on.wait(30)
            made.append(name)
            yield name, torch.zeros(2)

    feed = Feed(weights())
    sent: list[str] = []
    ended: list[BaseException] = []

    def send() -> None:
        try:
            sent.extend(name for name, _ in feed)
        except TransferLostError as error:
            ended.append(error)

    sender, other = threading.Thread(target=send), threading.Thread(target=feed.give_up)
    sender.start()
    assert making.wait(30)
    other.start()
    other.join(0.05)
    assert other.is_alive() and made == ["a"]
    go_on.set()
    other.join(30)
    sender.join(30)
    assert made == [*NAMES] and not sender.is_alive() and not other.is_alive()
    assert [str(error) for error in ended] == ["the update was given up"]
