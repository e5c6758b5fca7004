"""The identity of a store: everything that must be equal for states to be mixed.

Two stores with equal identities hold interchangeable shards. A difference in any field is a
`MismatchError` that names the field; different states are never mixed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from storage.errors import ConfigError, CorruptError, MismatchError
from storage.objects.sealed_json import digest_json, seal, unseal
from storage.profiles import PROFILES, ProfileName

FORMAT = "eyas-store"
FORMAT_VERSION = 3
READ_VERSIONS = (2, 3)
"""In a store of version 2 a shard is many objects; shards that are added to it have version 3."""
NORM_CONVENTIONS = ("post_norm",)
RECOMPUTE_MODES = ("one_sequence",)


@dataclass(frozen=True, kw_only=True, slots=True)
class OmittedStates:
    """The states that a store omits, because the target's first and last layers recompute them.

    These are the output of the first aux layer, computed from the token ids, and the last hidden
    state, computed from the output of the last aux layer.
    """

    mode: str
    """`one_sequence`: each sample is run alone, at generation and at recomputation; the layers
    after the last aux layer take its output in bfloat16."""
    early_layers: tuple[int, ...]
    """Decoder layers from the token ids to the first aux layer's output."""
    last_layers: tuple[int, ...]
    """Decoder layers between the last aux layer's output and the final norm."""

    def __str__(self) -> str:
        """Return a form for error messages."""
        return (
            f"layers {list(self.early_layers)} and {list(self.last_layers)} are recomputed, "
            f"mode {self.mode}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreIdentity:
    """The target model, tokenizer, template and encoding that every shard of a store shares."""

    target_fingerprint: str
    target_fields: Mapping[str, str]
    """The readable fields behind the fingerprint, so that a mismatch can name those that differ."""
    tokenizer_fingerprint: str
    template_fingerprint: str
    aux_layers: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    norm_convention: str
    """`post_norm`: the last hidden state is the state after the final norm."""
    profile: ProfileName
    """How states are encoded; see `docs/store-format.md`."""
    omitted: OmittedStates | None = None
    """None if every state is stored."""

    def __post_init__(self) -> None:
        """Refuse values that no store can have."""
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
        if self.omitted is not None:
            self._require_recomputable(self.omitted)

    def _require_recomputable(self, omitted: OmittedStates) -> None:
        if omitted.mode not in RECOMPUTE_MODES:
            known = ", ".join(RECOMPUTE_MODES)
            raise ConfigError(f"unknown recompute mode {omitted.mode!r}; known: {known}")
        early, last = omitted.early_layers, omitted.last_layers
        after = self.aux_layers[-1] + 1
        if (
            len(self.aux_layers) < 2
            or early != tuple(range(self.aux_layers[0] + 1))
            or last != tuple(range(after, after + len(last)))
        ):
            raise ConfigError(
                f"layers {early} and {last} do not fit aux layers {self.aux_layers}: "
                f"expected 0 to {self.aux_layers[0]}, and those from {after} on"
            )

    @property
    def stored_aux_layers(self) -> tuple[int, ...]:
        """The aux layers whose output shards hold."""
        return self.aux_layers if self.omitted is None else self.aux_layers[1:]

    @property
    def identity_id(self) -> str:
        """Digest of all fields: 32 hex digits. Every commit record carries it."""
        return digest_json(self._document())

    def _document(self) -> dict[str, object]:
        document = {field.name: getattr(self, field.name) for field in fields(self)}
        document["target_fields"] = dict(self.target_fields)
        document["aux_layers"] = list(self.aux_layers)
        del document["omitted"]
        if self.omitted is not None:
            document["left_out"] = {
                "mode": self.omitted.mode,
                "early_layers": list(self.omitted.early_layers),
                "last_layers": list(self.omitted.last_layers),
            }
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
            raise CorruptError(f"{what} has a missing or invalid field: {error!r}") from error

    @classmethod
    def _parse(cls, values: Mapping[str, Any]) -> Self:
        fields = dict(values)
        found = fields.pop("left_out", None)
        omitted = found and OmittedStates(
            mode=found["mode"],
            early_layers=tuple(found["early_layers"]),
            last_layers=tuple(found["last_layers"]),
        )
        return cls(**{**fields, "aux_layers": tuple(fields["aux_layers"])}, omitted=omitted or None)

    def require_equal(self, expected: Self, *, where: str) -> None:
        """Raise MismatchError naming every field in which this identity is not `expected`."""
        differences = list(self._differences(expected))
        if differences:
            listed = "; ".join(differences)
            raise MismatchError(
                f"{where} holds different states: {listed}. States of different targets are never "
                "mixed: choose another store path, or restore the settings it was created with"
            )

    def _differences(self, expected: Self) -> Iterator[str]:
        for field in fields(self):
            found, wanted = getattr(self, field.name), getattr(expected, field.name)
            if found == wanted:
                continue
            if field.name == "omitted":
                stored = "every state is stored"
                yield f"store.recompute: found {found or stored}, expected {wanted or stored}"
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
    """Raise MismatchError unless this code reads the format version of `document`."""
    found, version = document.get("format", FORMAT), document.get("format_version")
    if found != FORMAT or version not in READ_VERSIONS:
        known = " and ".join(map(str, READ_VERSIONS))
        raise MismatchError(
            f"{what} is {found} version {version}, this release reads {FORMAT} version {known}: "
            "read it with the release that wrote it"
        )
