"""What every test needs, wherever the suite is started."""

import signal

# Under nohup, cron or a shell's "&" SIGINT is ignored, and every process started here would inherit
# that: tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
