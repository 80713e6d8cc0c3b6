"""What a run hands back: an adapter or a merged pipeline that upstream's classes load, verified where we cannot help.

`adapter` and `merged` write a folder, `verify` loads it with upstream's classes alone in a process where this package
cannot be imported and compares velocities. `robot.py` and `verify_upstream.py` are files that run without this package.
"""
