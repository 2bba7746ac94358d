"""The files in configs/accelerate/, as `launch` writes them."""

from __future__ import annotations

from launch.accelerate_config import Start


def _comment(name: str, what: str, hardware: str, result: str, more: str = "") -> tuple[str, ...]:
    return (
        what,
        f"  accelerate launch --config_file configs/accelerate/{name}.yaml{more} recipes/bert_cls.py",
        f"Hardware: {hardware}. Result: {result}.",
    )


SHIPPED = {
    "cpu1": Start(1, cpu=True, comment=_comment("cpu1", "One process on the CPU.", "any", "strategy `single`")),
    "cpu2": Start(
        2,
        cpu=True,
        comment=(
            *_comment(
                "cpu2",
                "Two CPU ranks over gloo; another number with --num_processes N.",
                "two cores; `export ACCELERATE_USE_CPU=true` first where there are GPUs",
                "strategy `ddp`, or what --strategy.name says",
            ),
            "MULTI_GPU is right: with MULTI_CPU, accelerate starts one process.",
        ),
    ),
    "gpu_ddp": Start(
        8,
        "ddp",
        comment=_comment("gpu_ddp", "DDP over the GPUs of one node.", "8 GPUs (or --num_processes N)", "`ddp`"),
    ),
    "gpu_fsdp": Start(
        8,
        "fsdp",
        comment=_comment("gpu_fsdp", "FSDP2 over the GPUs of one node.", "8 GPUs (or --num_processes N)", "`fsdp`"),
    ),
    "gpu_zero3": Start(
        8,
        "zero3",
        comment=_comment("gpu_zero3", "ZeRO-3 over the GPUs of one node.", "8 GPUs (or --num_processes N)", "`zero3`"),
    ),
    "two_nodes": Start(
        16,
        nodes=2,
        address="node1",
        comment=(
            *_comment(
                "two_nodes",
                "DDP over two nodes: the same command on both, with --machine_rank 1 on the second.",
                "2 × 8 GPUs; put the first node's name for node1",
                "strategy `ddp`, or what --strategy.name says",
                " --machine_rank 0",
            ),
        ),
    ),
    "two_nodes_fsdp": Start(
        16,
        "fsdp",
        nodes=2,
        address="node1",
        comment=(
            *_comment(
                "two_nodes_fsdp",
                "FSDP2 over two nodes; with --strategy.shard_size 8 hybrid: shards inside a node, copies across.",
                "2 × 8 GPUs; put the first node's name for node1",
                "`fsdp`",
                " --machine_rank 0",
            ),
            "`python -m launch slurm --strategy hybrid`, or fsdp, takes this file, and says ranks and addresses.",
        ),
    ),
    "two_nodes_zero3": Start(
        16,
        "zero3",
        nodes=2,
        address="node1",
        comment=(
            *_comment(
                "two_nodes_zero3",
                "ZeRO-3 over two nodes: every rank holds a share of everything.",
                "2 × 8 GPUs; put the first node's name for node1",
                "`zero3`",
                " --machine_rank 0",
            ),
            "`python -m launch slurm --strategy zero3` takes this file, and says ranks and addresses.",
        ),
    ),
}
