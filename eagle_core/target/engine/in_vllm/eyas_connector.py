"""A connector that writes the hidden states of finished requests to files.

vLLM's method `extract_hidden_states` keeps the states of the chosen layers in a group of its cache.
When a request is finished, the scheduler tells the worker its blocks with the next step. The worker
copies the states out, frees the blocks and writes the file in a thread.

Shapes: T tokens of a request, S captured states, H hidden size.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec

FOLDER = "folder"
"""Setting of the connector: where the files go."""
PART = ".part"
FAILED = ".failed"
_WRITERS = 2


@dataclass
class _Finished:
    """A request whose states are complete."""

    request_id: str
    num_tokens: int
    blocks: Sequence[int]


@dataclass
class _FinishedRequests(KVConnectorMetadata):
    """What the scheduler tells the workers with a step."""

    requests: Sequence[_Finished]


class EyasConnector(KVConnectorBase_V1, SupportsHMA):
    """Writes the states [T, S, H] of each prompt to `folder/REQUEST_ID`, in the target's dtype.

    A file has its name only when it is complete.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        found = [
            place
            for place, group in enumerate(groups)
            if isinstance(group.kv_cache_spec, HiddenStateCacheSpec)
        ]
        if len(found) != 1 and len(groups) != 1:
            raise ValueError(
                "vLLM cannot capture states of this architecture: its cache mixes them"
            )
        self._group = found[0] if len(found) == 1 else 0
        self._block_size: int = groups[self._group].kv_cache_spec.block_size
        self._folder = Path(self._kv_transfer_config.get_from_extra_config(FOLDER, ""))
        self._finished: list[_Finished] = []
        self._cache: Tensor | None = None
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="eyas-states")

    # Of the scheduler.

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return that no states come from elsewhere."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Do nothing: no states come from elsewhere."""

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Keep the blocks of a request until its states are copied."""
        if not block_ids:  # it never ran
            return False, None
        self._finished.append(
            _Finished(request.request_id, len(request.prompt_token_ids), list(block_ids))
        )
        return True, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Keep the blocks of a request, of a cache with several groups."""
        return self.request_finished(request, block_ids[self._group] if block_ids else [])

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Return what the workers shall write with this step."""
        finished, self._finished = self._finished, []
        return _FinishedRequests(finished)

    # Of the workers.

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Remember the cache that holds the states: [blocks, S, tokens per block, H]."""
        layers = get_layers_from_vllm_config(
            self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches)
        )
        (name,) = layers
        self._cache = kv_caches[name]
        if self._cache.shape[2] != self._block_size:
            raise ValueError(
                f"vLLM's cache has blocks of {self._cache.shape[2]} tokens where its plan has "
                f"{self._block_size}"
            )

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Do nothing: no states come from elsewhere."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: no states come from elsewhere."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Do nothing: states are written when their request is finished."""

    def wait_for_save(self) -> None:
        """Do nothing: states are written when their request is finished."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Copy the states of finished requests, and return which blocks are free again."""
        if get_tensor_model_parallel_rank() != 0 or not self.has_connector_metadata():
            return None, None
        copied: set[str] = set()
        for one in self._get_connector_metadata().requests:
            self._writers.submit(_write, self._states(one), self._folder / one.request_id)
            copied.add(one.request_id)
        return copied or None, None

    def get_finished_count(self) -> int:
        """Return how many workers report a copied request: the first rank alone."""
        return 1

    def _states(self, one: _Finished) -> Tensor:
        """Return the states [T, S, H] of a request, in main memory."""
        assert self._cache is not None  # noqa: S101 (registered before the first step)
        blocks = torch.tensor(one.blocks, device=self._cache.device)
        states = self._cache[blocks].transpose(1, 2).flatten(0, 1)
        return states[: one.num_tokens].cpu().contiguous()

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Return the layout in which all states of a token lie together."""
        return "LBNHC"


def _write(states: Tensor, path: Path) -> None:
    """Write a file, or one that says why not."""
    partial = path.with_name(path.name + PART)
    try:
        states.view(torch.uint8).numpy().tofile(partial)
        partial.replace(path)
    except Exception as error:  # noqa: BLE001 (the engine waits for a file, whatever happens)
        partial.unlink(missing_ok=True)
        try:
            path.with_name(path.name + FAILED).write_text(str(error))
        except OSError:
            os._exit(1)
