"""What the trainer does at LVIS's real size, on files made for it: ``python -m bench scale``.

files.py makes the files; data.py, evaluation.py and selection.py measure, each in a process of its own
(parts.py); run.py starts them; report.py makes the README's table of what they found.
"""
