"""The names of our settings in other trainers, for their users. docs/settings.md shows them.

Sources: verl's configuration for Megatron (volcengine/verl, _generated_ppo_megatron_trainer.yaml) and its page on
rollout correction (docs/algo/rollout_corr.md), TRL's GRPOConfig and Transformers' TrainingArguments, ms-swift's script
for CHORD (examples/train/grpo/internal/chord.sh), and Trinity-RFT's example (examples/mix_chord/mix_chord.yaml). A name
is listed only if it means the same as ours, or if the note says what differs. ms-swift also takes TRL's names; only its
own names are listed.
"""

from __future__ import annotations

from typing import NamedTuple


class Names(NamedTuple):
    """The names of one setting. Empty: the trainer has none, or we have not found it there."""

    verl: str = ""
    trl: str = ""
    swift: str = ""
    trinity: str = ""
    note: str = ""


_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"

NAMES: dict[str, Names] = {
    "steps": Names(
        "trainer.total_training_steps",
        "max_steps",
        "max_steps",
        "buffer.total_epochs",
        "Trinity's are epochs",
    ),
    "seed": Names("data.seed", "seed", "seed"),
    "model.path": Names("actor_rollout_ref.model.path", "model", "model", "model.model_path"),
    "model.dtype": Names(f"{_ACTOR}.megatron.dtype", "bf16", "torch_dtype"),
    "model.recompute": Names(
        f"{_ACTOR}.megatron.override_transformer_config.recompute_granularity", "gradient_checkpointing"
    ),
    "model.megatron_overrides": Names(f"{_ACTOR}.megatron.override_transformer_config"),
    "parallel.tensor": Names(f"{_ACTOR}.megatron.tensor_model_parallel_size"),
    "parallel.pipeline": Names(f"{_ACTOR}.megatron.pipeline_model_parallel_size"),
    "parallel.virtual_pipeline": Names(f"{_ACTOR}.megatron.virtual_pipeline_model_parallel_size"),
    "parallel.context": Names(f"{_ACTOR}.megatron.context_parallel_size"),
    "parallel.expert": Names(f"{_ACTOR}.megatron.expert_model_parallel_size"),
    "parallel.sequence_parallel": Names(f"{_ACTOR}.megatron.sequence_parallel"),
    "parallel.distributed_optimizer": Names(f"{_ACTOR}.megatron.use_distributed_optimizer"),
    "data.prompts": Names(
        "data.train_files", "train_dataset", "dataset", "buffer.explorer_input.taskset.path"
    ),
    "data.demonstrations": Names("", "", "chord_sft_dataset", "buffer.trainer_input.sft_warmup_dataset.path"),
    "data.evaluation": Names(
        "data.val_files", "eval_dataset", "val_dataset", "buffer.explorer_input.eval_tasksets"
    ),
    "data.chat_template": Names("actor_rollout_ref.model.custom_chat_template"),
    "data.template_arguments": Names("data.apply_chat_template_kwargs", "chat_template_kwargs"),
    "data.system_prompt": Names("", "", "system"),
    "data.max_prompt_tokens": Names("data.max_prompt_length"),
    "data.max_response_tokens": Names(
        "data.max_response_length",
        "max_completion_length",
        "max_completion_length",
        "model.max_response_tokens",
    ),
    "data.overlong": Names("data.filter_overlong_prompts, data.truncation"),
    "batch.prompts": Names(
        "data.train_batch_size", "generation_batch_size", "", "buffer.batch_size", "TRL counts rollouts"
    ),
    "batch.rollouts": Names(f"{_ROLLOUT}.n", "num_generations", "num_generations", "algorithm.repeat_times"),
    "batch.demonstrations": Names(
        "",
        "",
        "chord_sft_per_device_train_batch_size",
        "algorithm.policy_loss_fn_args.train_batch_size_expert",
        "ms-swift's is that of one device and one accumulation step",
    ),
    "batch.updates_per_step": Names(
        f"{_ACTOR}.ppo_mini_batch_size",
        "steps_per_generation",
        "steps_per_generation",
        "algorithm.policy_loss_fn_args.ppo_mini_batch_size",
        "verl and Trinity give the size of a mini-batch; here it is their number",
    ),
    "batch.epochs": Names(f"{_ACTOR}.ppo_epochs", "num_iterations"),
    "batch.max_tokens_per_gpu": Names(
        f"{_ACTOR}.ppo_max_token_len_per_gpu", "", "", "", "in verl only with use_dynamic_bsz"
    ),
    "method.mu": Names(
        "",
        "",
        "chord_mu_peak, chord_mu_valley, chord_mu_warmup_steps, chord_mu_decay_steps",
        "algorithm.policy_loss_fn_args.mu_peak, mu_valley, mu_warmup_steps, mu_decay_steps",
        "schedule: warmup_cosine",
    ),
    "method.token_weight": Names(
        "",
        "",
        "chord_enable_phi_function",
        "algorithm.policy_loss_fn_args.enable_phi_function",
        "true is phi, false one",
    ),
    "method.cutoff": Names(
        "", "", "", "cutoff_prob", "of Trinity's loss sft_phi; its mix_chord does not pass it"
    ),
    "objective.surrogate": Names(
        f"{_ACTOR}.policy_loss.loss_mode",
        "loss_type, importance_sampling_level",
        "",
        "",
        "TRL's loss_type is also the average",
    ),
    "objective.clip_low": Names(
        f"{_ACTOR}.clip_ratio_low", "epsilon", "epsilon", "algorithm.policy_loss_fn_args.clip_range"
    ),
    "objective.clip_high": Names(
        f"{_ACTOR}.clip_ratio_high",
        "epsilon_high",
        "epsilon_high",
        "algorithm.policy_loss_fn_args.clip_range",
    ),
    "objective.dual_clip": Names(
        f"{_ACTOR}.clip_ratio_c",
        "delta",
        "delta",
        "",
        "on (3.0) by default in verl and Trinity; off here and in TRL",
    ),
    "objective.aggregation": Names(f"{_ACTOR}.loss_agg_mode", "loss_type"),
    "objective.advantage": Names(
        "algorithm.norm_adv_by_std_in_grpo",
        "scale_rewards",
        "scale_rewards",
        "",
        "TRL's group is group_std here, its none is group_mean, its batch is batch_std",
    ),
    "objective.truncated": Names("", "mask_truncated_completions", "overlong_filter"),
    "objective.entropy_bonus": Names(f"{_ACTOR}.entropy_coeff"),
    "objective.kl.coefficient": Names(
        f"{_ACTOR}.kl_loss_coef",
        "beta",
        "beta",
        "algorithm.kl_loss_fn_args.kl_coef",
        "in verl only with use_kl_loss",
    ),
    "objective.kl.estimator": Names(
        f"{_ACTOR}.kl_loss_type", "", "", "", "verl's kl is k1, mse is k2 and low_var_kl is k3"
    ),
    "objective.correction.mode": Names("", "vllm_importance_sampling_mode"),
    "objective.correction.level": Names("algorithm.rollout_correction.rollout_is"),
    "objective.correction.high": Names(
        "algorithm.rollout_correction.rollout_is_threshold", "vllm_importance_sampling_cap"
    ),
    "reward.path": Names(
        "reward.custom_reward_function.path",
        note="verl's function has other arguments; before it was custom_reward_function.path",
    ),
    "reward.name": Names("reward.custom_reward_function.name"),
    "reward.weight": Names("", "reward_weights", note="TRL lists the weights of all reward functions"),
    "rollout.temperature": Names(
        f"{_ROLLOUT}.temperature",
        "temperature",
        "temperature",
        "buffer.explorer_input.taskset.rollout_args.temperature",
    ),
    "rollout.dtype": Names(f"{_ROLLOUT}.dtype", "", "", "explorer.rollout_model.dtype"),
    "rollout.servers": Names("", "vllm_server_base_url", "", "", "with vllm_mode: server"),
    "rollout.tensor": Names(
        f"{_ROLLOUT}.tensor_model_parallel_size",
        "vllm_tensor_parallel_size",
        "",
        "explorer.rollout_model.tensor_parallel_size",
    ),
    "rollout.gpu_memory_utilization": Names(
        f"{_ROLLOUT}.gpu_memory_utilization", "vllm_gpu_memory_utilization", "vllm_gpu_memory_utilization"
    ),
    "rollout.sleep": Names(f"{_ROLLOUT}.free_cache_engine", "vllm_enable_sleep_mode", "sleep_level"),
    "rollout.offload": Names(
        f"{_ACTOR}.megatron.optimizer_offload, grad_offload", "", "offload_optimizer, offload_model"
    ),
    "optim.lr": Names(f"{_ACTOR}.optim.lr", "learning_rate", "learning_rate"),
    "optim.min_lr": Names(f"{_ACTOR}.optim.min_lr"),
    "optim.schedule": Names(f"{_ACTOR}.optim.lr_decay_style", "lr_scheduler_type"),
    "optim.warmup_steps": Names(
        f"{_ACTOR}.optim.lr_warmup_steps", "warmup_steps", "warmup_ratio", "", "ms-swift's is a share"
    ),
    "optim.weight_decay": Names(f"{_ACTOR}.optim.weight_decay", "weight_decay"),
    "optim.beta1": Names(f"{_ACTOR}.optim.betas", "adam_beta1"),
    "optim.beta2": Names(f"{_ACTOR}.optim.betas", "adam_beta2"),
    "optim.eps": Names("", "adam_epsilon"),
    "optim.clip_grad": Names(f"{_ACTOR}.optim.clip_grad", "max_grad_norm"),
    "evaluation.every": Names("trainer.test_freq", "eval_steps", "", "explorer.eval_interval"),
    "evaluation.temperature": Names(f"{_ROLLOUT}.val_kwargs.temperature"),
    "evaluation.samples": Names(f"{_ROLLOUT}.val_kwargs.n", "num_generations_eval"),
    "checkpoint.every": Names("trainer.save_freq", "save_steps", "save_steps", "trainer.save_interval"),
    "checkpoint.keep": Names("trainer.max_actor_ckpt_to_keep", "save_total_limit", "save_total_limit"),
    "timeouts.collective_s": Names("actor_rollout_ref.nccl_timeout", "ddp_timeout"),
    "timeouts.server_start_s": Names("", "vllm_server_timeout"),
    "timeouts.weight_push_s": Names("", "", "", "synchronizer.sync_timeout"),
}
