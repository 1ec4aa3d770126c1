"""The checks, one file per area.

Each check is a function of a :class:`vmmblk.conform.target.Target` under ``@check()``.  Its docstring's first line
tells what a device does that passes, and names the rules in brackets; binding rules and others are not mixed.  A check
takes nothing for granted but what the specification says: no layout, no size, no feature that it has not required.
"""
