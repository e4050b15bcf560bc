"""The messages of one phase of a round, and who was asked by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flwr.app import Message, Metadata, RecordDict


class Requests:
    """What has been asked in the phase that runs; `ask` begins another."""

    def __init__(self) -> None:
        self._asked: list[Metadata] = []  # their ids are set when the messages are pushed

    def ask(
        self, nodes: Sequence[int], content_for: Callable[[int], RecordDict], message_type: str, server_round: int
    ) -> list[Message]:
        """One message a node; no nodes for a phase that asks nobody."""
        messages = [
            Message(content_for(node), dst_node_id=node, message_type=message_type, group_id=str(server_round))
            for node in nodes
        ]
        self._asked = [message.metadata for message in messages]
        return messages

    def ask_nobody(self) -> list[Message]:
        """A phase without messages."""
        self._asked = []
        return []

    @property
    def clients(self) -> tuple[str, ...]:
        """Who was asked."""
        return tuple(str(about.dst_node_id) for about in self._asked)

    def by_id(self) -> dict[str, str]:
        """Node ids by the ids of the requests; empty if the messages have not been sent through a Grid."""
        return {about.message_id: str(about.dst_node_id) for about in self._asked if about.message_id}
