"""The benches: what each loss costs, beside eager PyTorch, compiled PyTorch and a plain copy.

python -m bench            measure on this machine's CPU and append to bench/records/cpu.jsonl
python -m bench gpu        measure on its GPU and append to bench/records/gpu.jsonl (--dry-run: on the CPU)
python -m bench scale      the trainer at LVIS's real size, on files made for it; bench/records/scale.jsonl
python -m bench training   the trainer's step on the GPU and what bounds it; bench/records/training.jsonl
python -m bench learning   a detector trained with each loss in turn; bench/records/learning.jsonl
python -m bench readme     write the README's tables from the newest complete runs
python -m bench plot       draw bench/plots/cpu.png and gpu.png from them

The first two measure real batches with --batch FILE: what the trainer saves with train.capture_steps.
"""
