"""One published method a file: functions that replace the defaults of the same name (lib/method.py)."""
