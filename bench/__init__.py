"""The benches: what each loss costs, beside eager PyTorch, compiled PyTorch and a plain copy.

python -m bench            measure on this machine's CPU and append to bench/records/cpu.jsonl
python -m bench readme     write the README's tables from the newest complete run
python -m bench plot       draw bench/plots/cpu.png from it
"""
