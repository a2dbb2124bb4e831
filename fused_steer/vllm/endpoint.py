"""Routes of vLLM's server for steering adapters: list, load, unload, and choose the default.

vLLM loads them if `VLLM_PLUGINS` names fused_steer (entry point `vllm.endpoint_plugins`).

    GET  /v1/steering                                       the adapters and the default
    POST /v1/steering/load     {"name": …, "path": …}       a path on the server; "in_place": true replaces an adapter
    POST /v1/steering/unload   {"name": …}
    POST /v1/steering/default  {"name": … or null}          the adapter of requests that name none
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

from .frontend import Registry, registry_of


class Load(BaseModel):
    """The body of a request to load an adapter."""

    model_config = ConfigDict(extra="forbid")
    name: str
    path: str
    in_place: bool = False


class Name(BaseModel):
    """The body of a request about a loaded adapter."""

    model_config = ConfigDict(extra="forbid")
    name: str


class Default(BaseModel):
    """The body of a request to choose the default adapter, None for none."""

    model_config = ConfigDict(extra="forbid")
    name: str | None


router = APIRouter(prefix="/v1/steering")


def _parts(request: Request, changes: bool = True) -> tuple[Any, Registry]:
    """Return the server's models and the adapters of its engine.

    Args:
        changes: whether they will be changed.
    """
    models: Any = getattr(request.app.state, "openai_serving_models", None)
    registry = None if models is None else registry_of(models.input_processor)
    if registry is None:
        raise HTTPException(503, "the server serves no adapters; expected --enable-lora, or steering's options")
    count = models.input_processor.vllm_config.parallel_config._api_process_count
    if changes and count > 1:
        # Another process would not know of it, and could give the same number to another adapter.
        raise HTTPException(503, f"the server has {count} API processes; expected --api-server-count 1 for changes")
    return models, registry


def _raise(answer: Any) -> None:
    """Raise for an error of vLLM's model list."""
    if not isinstance(answer, str):
        raise HTTPException(answer.error.code, answer.error.message)


@router.get("")
async def show(request: Request) -> dict[str, Any]:
    """List the adapters that requests can name, and the default one."""
    _, registry = _parts(request, changes=False)
    adapters = [{"name": name, "path": each.lora_path} for name, each in sorted(registry.named.items())]
    return {"adapters": adapters, "default": registry.default}


@router.post("/load")
async def load(body: Load, request: Request) -> dict[str, Any]:
    """Load an adapter."""
    models, _ = _parts(request)
    asked = LoadLoRAAdapterRequest(lora_name=body.name, lora_path=body.path, load_inplace=body.in_place)
    _raise(await models.load_lora_adapter(asked))
    return await show(request)


@router.post("/unload")
async def unload(body: Name, request: Request) -> dict[str, Any]:
    """Unload an adapter. Requests that run keep it."""
    models, _ = _parts(request)
    _raise(await models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=body.name)))
    return await show(request)


@router.post("/default")
async def choose_default(body: Default, request: Request) -> dict[str, Any]:
    """Choose the adapter of requests that name none."""
    _, registry = _parts(request)
    if body.name is not None and body.name not in registry.named:
        known = ", ".join(sorted(registry.named)[:20]) or "none"
        raise HTTPException(404, f"name is {body.name!r}; expected a loaded adapter: {known}")
    registry.default = body.name
    return await show(request)


class SteeringEndpoint:
    """vLLM's interface of a plug-in with routes."""

    name = "fused_steer"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        pass


# ------------------------------------------------------------------------------------------------ vLLM's list of models


def make_models(original: Any) -> Callable[..., Any]:
    """Wrap the constructor of the server's list of models: it lists the adapters of the options' directory."""

    def __init__(self: Any, engine_client: Any, *args: Any, **kwargs: Any) -> None:
        original(self, engine_client, *args, **kwargs)
        registry = registry_of(engine_client.input_processor)
        if registry is not None:
            self.lora_requests.update(registry.named)

    return __init__


def load_adapter(original: Any) -> Callable[..., Any]:
    """Wrap the method that puts an adapter into the list of models. One loaded in place is not loaded by each request.

    vLLM's list keeps the request to load it as it was, so that each request would read its files again.
    """

    async def load_lora_adapter(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        answer = await original(self, request, *args, **kwargs)
        registry = registry_of(self.input_processor)
        if isinstance(answer, str) and registry is not None:
            asked = self.lora_requests[request.lora_name]
            self.lora_requests[request.lora_name] = registry.as_loaded(asked)
        return answer

    return load_lora_adapter


def unload_adapter(original: Any) -> Callable[..., Any]:
    """Wrap the method that takes an adapter from the list of models: options cannot name it any longer."""

    async def unload_lora_adapter(self: Any, request: Any) -> Any:
        asked = self.lora_requests.get(request.lora_name)
        answer = await original(self, request)
        registry = registry_of(self.input_processor)
        if isinstance(answer, str) and registry is not None and asked is not None:
            registry.unname(asked)
        return answer

    return unload_lora_adapter
