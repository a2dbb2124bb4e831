"""A test of steering in vLLM beside images: the text decoder of a tiny LLaVA, against transformers (HF)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import build, randomize
from text import tokenizer
from vllm_models import NEW_TOKENS, SIZES, engine_options

from fused_steer import SteerConfig, patch_model

pytestmark = pytest.mark.vllm

SIDE, TOKENS = 28, 4  # of an image: pixels, and tokens that take its place
PROMPTS = ["ab{image}cde", "fg {image} h?"]


def save_llava(folder: Path) -> None:
    """Save a LLaVA with as many layers in its tower of images as in its decoder."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = build(**SIZES).config
    tower = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=text.num_hidden_layers, num_attention_heads=2,
        image_size=SIDE, patch_size=SIDE // 2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=TOKENS,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        pixels,
        words,
        patch_size=SIDE // 2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def test_vllm_requests_with_images(tmp_path):
    """Steered and unsteered requests with different images in a batch; again from the cache; generated tokens alone."""
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    save_llava(tmp_path / "model")
    model = patch_model(LlavaForConditionalGeneration.from_pretrained(tmp_path / "model"), SteerConfig(rank=4))
    randomize(model, seed=1)
    model.steering.save(tmp_path / "silu")
    pixels = np.random.default_rng(0).integers(0, 255, (len(PROMPTS), SIDE, SIDE, 3), dtype=np.uint8)
    images = [Image.fromarray(each) for each in pixels]
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    image = processor.tokenizer.convert_tokens_to_ids("<image>")

    def ids(prompt: str, count: int) -> list[int]:
        before, _, after = prompt.partition("{image}")
        return [*processor.tokenizer(before).input_ids, *[image] * count, *processor.tokenizer(after).input_ids]

    def right(row: int, adapter: str | None, positions: str) -> list[int]:
        prompt = torch.tensor([ids(PROMPTS[row], TOKENS)])
        seen = processor.image_processor(images=[images[row]], return_tensors="pt")["pixel_values"]
        with model.steering.batch([adapter], positions=positions):
            found = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), pixel_values=seen,
                max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return found[0, prompt.shape[1] :].tolist()

    engine = LLM(**engine_options(tmp_path / "model", lora_target_modules=["post_block"]))
    rows = [(row, adapter) for row in range(len(PROMPTS)) for adapter in (None, "default")]
    inputs: list[Any] = [
        {"prompt_token_ids": ids(PROMPTS[row], 1), "multi_modal_data": {"image": images[row]}} for row, _ in rows
    ]
    loras = [adapter and LoRARequest(adapter, 1, str(tmp_path / "silu")) for _, adapter in rows]
    for positions in ("all", "all", "generated"):
        given = {"steering": {"positions": positions}}
        parameters = [
            SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, extra_args=lora and given)
            for lora in loras
        ]
        outputs = engine.generate(inputs, parameters, lora_request=loras, use_tqdm=False)
        expected = [right(row, adapter, positions) for row, adapter in rows]
        assert len({tuple(tokens) for tokens in expected}) == len(rows)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    engine.llm_engine.engine_core.shutdown()
