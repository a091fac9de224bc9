"""YAML that knows where it stands: every value with its file, line and path, so that each mistake can be pointed at.

Why not load to plain dicts and validate those: the line is lost, and "line 14" is what a person with an editor open
needs. PyYAML's composer gives nodes with marks; the small reader below asks them for exactly what a schema wants, and
says in one sentence where it is something else. Keys that nobody asked for and keys given twice are mistakes, too: a
misspelt ``drainTimoutSeconds`` must not pass silently.

Left to ``config``: which fields there are, and what they mean.
"""

import re
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, ip_address
from typing import Final

import yaml

from lbpod.core.limits import CONFIG_NESTING_MAX, SENTENCE_BYTES_MAX
from lbpod.core.model import parse_address

_INTEGER: Final = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
"""As people write them. YAML would take 0120 for octal, 8_0 for 80 and 1:20 for 80, too."""

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where PyYAML was built with it: 65,536 backends in 4 s instead of 60."""


class ConfigError(Exception):
    """A configuration that cannot be used. str(): ``FILE:LINE: FIELD: sentence``."""


class Value:
    """A YAML value with its place. Raises ConfigError from every question that it cannot answer with yes."""

    def __init__(self, file: str, path: str, node: yaml.Node) -> None:
        self._file = file
        self._node = node
        self.path = path
        self.line = node.start_mark.line + 1

    def error(self, sentence: str) -> ConfigError:
        """To be raised by whoever finds more. What is quoted of the file is cut, and cannot move anybody's cursor."""
        where = f"{self._file}:{self.line}: "
        return ConfigError(f"{where}{_plain(self.path)}: {_plain(sentence)}" if self.path else where + _plain(sentence))

    @property
    def is_mapping(self) -> bool:
        return isinstance(self._node, yaml.MappingNode)

    @property
    def is_list(self) -> bool:
        return isinstance(self._node, yaml.SequenceNode)

    @property
    def is_nothing(self) -> bool:
        return self._node.tag == "tag:yaml.org,2002:null"

    def items(self) -> Iterator["Value"]:
        """The values of a list."""
        if not isinstance(self._node, yaml.SequenceNode):
            raise self.error(f"{self._said()} is not a list")
        for number, node in enumerate(self._node.value):
            yield Value(self._file, f"{self.path}[{number}]", node)

    def mapping(self) -> dict[str, "Value"]:
        """The fields of a mapping, whatever their names."""
        if not isinstance(self._node, yaml.MappingNode):
            raise self.error(f"{self._said()} is not a mapping of fields")
        fields: dict[str, Value] = {}
        for key, node in self._node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise Value(self._file, self.path, key).error("a key has to be plain text")
            value = Value(self._file, f"{self.path}.{key.value}" if self.path else key.value, node)
            value.line = key.start_mark.line + 1
            if key.value in fields:
                raise value.error(f"given twice, first on line {fields[key.value].line}; remove one")
            fields[key.value] = value
        return fields

    def fields(self, required: Mapping[str, str], optional: tuple[str, ...] = ()) -> dict[str, "Value"]:
        """The fields of a mapping: all that are required (name: what to do where it is missing) and no unknown ones."""
        fields = self.mapping()
        for name in sorted(fields.keys() - required.keys() - set(optional)):
            known = ", ".join(sorted([*required, *optional]))
            raise fields[name].error(f"unknown field; known here: {known}")
        for name, advice in required.items():
            if name not in fields:
                raise self.error(f"{name} is missing; {advice}")
        return fields

    def text(self) -> str:
        """A scalar as written."""
        if not isinstance(self._node, yaml.ScalarNode) or self.is_nothing or not self._node.value:
            raise self.error(f"{self._said()} is not text")
        return str(self._node.value)

    def choice(self, known: Mapping[str, int]) -> int:
        """One of a few words."""
        if (word := self.text()) not in known:
            raise self.error(f"{word} is not known; use {' or '.join(known)}")
        return known[word]

    def integer(self, low: int, high: int, what: str = "a whole number") -> int:
        """A whole number from low to high."""
        word = self.text()
        is_number = self._node.tag == "tag:yaml.org,2002:int" and _INTEGER.fullmatch(word)
        if not is_number or not low <= int(word) <= high:
            raise self.error(f"{word} is not {what}; use {low} to {high}")
        return int(word)

    def port(self) -> int:
        """A port number."""
        return self.integer(1, 65_535, "a port")

    def yes_or_no(self) -> bool:
        """true or false, as YAML 1.2 has them: a bare ``on`` is a mistake here."""
        if (word := self.text()) not in {"true", "false"}:
            raise self.error(f"{word} is neither true nor false")
        return word == "true"

    def address(self) -> bytes:
        """16 bytes of an IPv4 address that packets can be sent to."""
        word = self.text()
        try:
            found = ip_address(word)
        except ValueError as error:
            raise self.error(f"{word} is not an IP address; use one like 203.0.113.10") from error
        if not isinstance(found, IPv4Address):
            raise self.error(f"{word} is IPv6, which is not supported yet; use an IPv4 address")
        if found.is_multicast or found.is_loopback or found.is_reserved or found.packed[0] == 0:
            raise self.error(f"{word} is not the address of one machine")
        return parse_address(word)

    @property
    def is_integer(self) -> bool:
        return self._node.tag == "tag:yaml.org,2002:int"

    def _said(self) -> str:
        if self.is_nothing:
            return "nothing"
        if isinstance(self._node, yaml.ScalarNode):
            return str(self._node.value)[:80] or "an empty text"
        return "a list" if self.is_list else "a mapping"


def _plain(text: str) -> str:
    """Keys are as much the file's words as values are: both end on a terminal."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text[:SENTENCE_BYTES_MAX])


def documents(file: str, data: bytes) -> list[Value]:
    """The documents of a YAML file that hold anything. Raises ConfigError where it is not YAML."""
    try:
        _check_nesting(file, data)
        loader = _LOADER(data)
        try:
            found = []
            while loader.check_node():
                node = loader.get_node()
                assert node is not None, "check_node has just said that there is a document"
                found.append(Value(file, "", node))
        finally:
            loader.dispose()
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 1
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "too deeply nested or no text"
        if (
            "nesting depth" in reason
        ):  # newer libyaml has a limit of its own, and its scanner is far ahead of the events
            raise _too_deep(file, line) from error
        raise ConfigError(f"{file}:{line}: this is not YAML: {reason}") from error
    return [value for value in found if not value.is_nothing]


def _check_nesting(file: str, data: bytes) -> None:
    """Raises ConfigError, yaml.YAMLError. libyaml's composer calls itself for every level, until the C stack ends and
    with it the process; its events come one by one."""
    depth = 0
    for event in yaml.parse(data, Loader=_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > CONFIG_NESTING_MAX:
            mark = event.start_mark
            line = mark.line + 1 if mark is not None else 1
            raise _too_deep(file, line)


def _too_deep(file: str, line: int) -> ConfigError:
    return ConfigError(f"{file}:{line}: nested deeper than {CONFIG_NESTING_MAX} levels; no field here is")
