"""Pretrained models that are sharded as they are read: what ``from_pretrained`` gives, never whole on a rank."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist

import shardline
from tests.harness import assert_identical, is_whole, most_bytes
from tests.integrations.clients import assert_alike, config, fresh, gpt, needs
from tests.integrations.test_transformers import each, train

pytestmark = needs("transformers", "accelerate")
STAGE3 = config(3, train_batch_size=4, optimizer={"type": "SGD", "params": {"lr": 0.1}})


def llama(**more):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **more))


def mixtral():
    """Its experts are files' tensors of their own, which Transformers joins."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(3)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3))


def read(folders):
    import transformers
    from transformers import AutoModelForCausalLM

    from shardline.integrations import pretrained

    fresh()
    if dist.get_rank():
        pretrained.safe_open = None  # rank 0 reads
    for folder, options in folders:
        model, most = most_bytes(partial(pretrained.from_pretrained, AutoModelForCausalLM, folder, **options))
        assert not any(map(is_whole, model.parameters()))
        wanted = AutoModelForCausalLM.from_pretrained(folder, **options)
        assert type(model) is type(wanted) and model.dtype == wanted.dtype
        assert model.generation_config.eos_token_id == wanted.generation_config.eos_token_id
        sizes = [param.nbytes for param in wanted.parameters()]
        buffers = 3 * sum(buffer.nbytes for buffer in wanted.buffers())
        assert most <= sum(sizes) / dist.get_world_size() + 2.2 * max(sizes) + buffers, (most, sizes)
        engine, *_ = shardline.initialize(model=model, config=STAGE3)
        assert_identical(engine.full_state_dict(), {k: v.float() for k, v in wanted.state_dict().items()})
        engine.destroy()
    said = []
    for given in ({"path": folders[0][0], "device_map": "auto"}, {"path": folders[0][0] + "/nothing"}):
        try:
            pretrained.from_pretrained(transformers.LlamaForCausalLM, **given)
        except Exception as error:
            said.append(str(error))
    return said


def test_rank_0_reads_and_all_get_their_part(ranks, tmp_path) -> None:
    made = {"llama": llama(), "tied": llama(tie_word_embeddings=True), "gpt": gpt(), "mixtral": mixtral()}
    for name, model in made.items():
        model.save_pretrained(tmp_path / name, max_shard_size="200KB")
    folders = [(str(tmp_path / name), {}) for name in made] + [(str(tmp_path / "llama"), {"dtype": torch.bfloat16})]
    for said in ranks(read, 2, folders, timeout=200):
        assert "device_map=" in said[0]
        assert len(said) == 2 and "nothing" in said[1]


def pretrained(folder):
    from transformers import AutoModelForCausalLM

    from shardline.integrations.transformers import from_pretrained

    model = from_pretrained(AutoModelForCausalLM, folder)
    several = dist.is_initialized() and dist.get_world_size() > 1
    assert [is_whole(param) for param in model.parameters()] == [not several] * len(list(model.parameters()))
    return model


def test_the_trainer_goes_on_from_it(ranks, tmp_path) -> None:
    gpt().save_pretrained(tmp_path / "begin")
    wanted = ranks(train, 1, str(tmp_path / "plain"), None, timeout=200)[0]
    begin = partial(pretrained, str(tmp_path / "begin"))
    for world, stages in ((2, (1, 3)), (1, (3,))):
        for found in ranks(each, world, str(tmp_path / str(world)), stages, model=begin, timeout=300):
            for figures in found:
                assert_alike(figures, wanted)
