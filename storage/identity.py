"""What a store holds states of: everything that must be equal for states to be mixed.

Two stores with equal identities hold interchangeable shards. A difference in any field is a
`MismatchError` that names the field; nothing is ever mixed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Self

from storage.canonical import digest_json, seal, unseal
from storage.errors import ConfigError, CorruptError, MismatchError

FORMAT = "eyas-store"
FORMAT_VERSION = 2
PROFILES = ("raw", "lossless", "int8", "int6")
DEFAULT_PROFILE: Final = "lossless"
NORM_CONVENTIONS = ("post_norm",)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreIdentity:
    """The target model, tokenizer, template and encoding that every shard of a store shares."""

    target_fingerprint: str
    target_fields: Mapping[str, str]
    """The readable fields behind the fingerprint, so that a mismatch can say which one differs."""
    tokenizer_fingerprint: str
    template_fingerprint: str
    aux_layers: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    norm_convention: str
    """`post_norm`: the last hidden state is the state after the final norm."""
    profile: str
    """How states are encoded; see `docs/store-format.md`."""

    def __post_init__(self) -> None:
        """Refuse values no store can have."""
        if self.profile not in PROFILES:
            raise ConfigError(f"unknown profile {self.profile!r}; known: {', '.join(PROFILES)}")
        if self.norm_convention not in NORM_CONVENTIONS:
            known = ", ".join(NORM_CONVENTIONS)
            raise ConfigError(f"unknown norm convention {self.norm_convention!r}; known: {known}")
        if self.hidden_size < 2 or self.vocab_size < 1 or not self.aux_layers:
            raise ConfigError(
                f"impossible shape: hidden_size {self.hidden_size}, vocab_size {self.vocab_size}, "
                f"aux_layers {self.aux_layers}"
            )

    @property
    def identity_id(self) -> str:
        """Digest of all fields: 32 hex digits. Every commit record carries it."""
        return digest_json(self._document())

    def _document(self) -> dict[str, object]:
        document = {field.name: getattr(self, field.name) for field in fields(self)}
        document["target_fields"] = dict(self.target_fields)
        document["aux_layers"] = list(self.aux_layers)
        return document

    def to_json(self) -> bytes:
        """Serialise as the content of `store.json`."""
        return seal(
            {"format": FORMAT, "format_version": FORMAT_VERSION, "identity": self._document()}
        )

    @classmethod
    def from_json(cls, data: bytes, *, what: str = "store.json") -> Self:
        """Parse `store.json`; raise CorruptError or, for another format version, MismatchError."""
        document = unseal(data, what=what)
        require_format(document, what=what)
        try:
            return cls._parse(document["identity"])
        except (KeyError, TypeError) as error:
            raise CorruptError(f"{what} lacks or garbles a field: {error!r}") from error

    @classmethod
    def _parse(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{**values, "aux_layers": tuple(values["aux_layers"])})

    def require_equal(self, expected: Self, *, where: str) -> None:
        """Raise MismatchError naming every field in which this identity is not `expected`."""
        differences = list(self._differences(expected))
        if differences:
            listed = "; ".join(differences)
            raise MismatchError(
                f"{where} holds other states: {listed}. States of different targets are never "
                "mixed: choose another store path, or go back to the settings it was made with"
            )

    def _differences(self, expected: Self) -> Iterator[str]:
        for field in fields(self):
            found, wanted = getattr(self, field.name), getattr(expected, field.name)
            if found == wanted:
                continue
            if field.name != "target_fields":
                yield f"{field.name}: found {found!r}, expected {wanted!r}"
                continue
            for name in sorted({*found, *wanted}):
                if found.get(name) != wanted.get(name):
                    yield (
                        f"target {name}: found {found.get(name)!r}, expected {wanted.get(name)!r}"
                    )


def require_format(document: Mapping[str, Any], *, what: str) -> None:
    """Raise MismatchError unless `document` is of the one format version this code knows."""
    found = (document.get("format", FORMAT), document.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise MismatchError(
            f"{what} is {found[0]} version {found[1]}, this release reads {FORMAT} version "
            f"{FORMAT_VERSION}: read it with the release that wrote it"
        )
