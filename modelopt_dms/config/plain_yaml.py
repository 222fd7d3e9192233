# SPDX-License-Identifier: Apache-2.0
"""YAML as people write it, and nothing that is large, deep or ambiguous."""

from pathlib import Path
from typing import Any

import yaml

# Our longest recipe has 3,000 characters and 400 values; PyYAML reads about 100,000 characters a second.
MOST_CHARACTERS = 200_000
MOST_VALUES = 20_000
MOST_LEVELS = 40


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word or a number", key_node.start_mark
                )
            key = (key_node.tag, key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The value of a YAML document: mappings, lists, text, numbers, booleans and null.

    Raises:
        yaml.YAMLError: no YAML; a key that stands twice; values of other types; or more than can be meant.
    """
    found = _documents(text)
    if len(found) > 1:
        raise yaml.YAMLError(f"{len(found)} documents, accepted is one")
    return found[0] if found else None


def read_yaml_file(path: Path) -> list[Any]:
    """The values of all documents in a file, which is not read if it is too large.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
        yaml.YAMLError: as `read_yaml`.
    """
    if path.stat().st_size > 4 * MOST_CHARACTERS:
        raise yaml.YAMLError(f"{path.stat().st_size} bytes, accepted are at most {MOST_CHARACTERS}")
    return _documents(path.read_text(encoding="utf-8"))


def _documents(text: str) -> list[Any]:
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"{len(text)} characters, accepted are at most {MOST_CHARACTERS}")
    loader = _Loader(text)
    found = []
    try:
        while loader.check_node():
            node = loader.get_node()
            assert node is not None  # check_node has found it
            _count(node, {}, 1)
            found.append(_plain(loader.construct_document(node)))
    except RecursionError:
        raise yaml.YAMLError(f"nested deeper than {MOST_LEVELS} levels") from None
    except ValueError as error:  # of a number or a date
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()
    return found


def _count(node: yaml.Node, sizes: dict[int, int], level: int) -> int:
    """Values under a node as they would be written without aliases."""
    if level > MOST_LEVELS:
        raise yaml.YAMLError(f"nested deeper than {MOST_LEVELS} levels")
    if id(node) not in sizes:
        # Counted while it is open: an alias to what it stands in never ends, and is refused by its levels.
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [x for pair in node.value for x in pair]
        sizes[id(node)] = 1 + sum(_count(x, sizes, level + 1) for x in parts)
    if sizes[id(node)] > MOST_VALUES:
        raise yaml.YAMLError(
            f"more than {MOST_VALUES} values, accepted are at most {MOST_VALUES} (aliases count as what they stand for)"
        )
    return sizes[id(node)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise yaml.YAMLError(
        f"a {type(value).__name__} ({value!r}) is no text, number, mapping or list"
    )
