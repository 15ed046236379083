"""What a line will take before it is started: seconds, money, bytes, requests, and what it waits for.

Arithmetic on what a recipe says and what a machine was measured to do; nothing here reads or writes but `probe` and `trial`,
which measure.
"""
