"""What ends a run before its last step: signals, and numbers that are not finite."""

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time

import torch
from tqdm import tqdm

from engine.errors import RunError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
GRACE_S = 20  # below the 30 s that torchrun gives a process between SIGTERM and SIGKILL


class Signals:
    """Within ``with``, each of STOP_SIGNALS stops all ranks after the same step: ``stop`` returns
    its name.

    Each step starts an asynchronous max-reduce of signal numbers and reads the previous result, so
    several processes stop one step later than a single one. A thread acts where the main thread is
    blocked in a collective. It ends the process at a second Ctrl-C, and if the step does not end
    within GRACE_S seconds of a signal, because another process died.
    """

    def __init__(self, world):
        self.world, self.heard, self.pending, self.stopped_by = world, None, None, None
        self.stepping = True

    def __enter__(self):
        reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        # nohup ignores SIGHUP; so does a run under it
        self.before = {number: signal.signal(number, self.hear) for number in STOP_SIGNALS
                       if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}
        self.terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        threading.Thread(target=self.watch, args=(reader,), daemon=True).start()
        return self

    def hear(self, number, frame):
        """The handler, which Python calls in the main thread, between two of its operations."""
        self.heard = signal.Signals(number).name

    def watch(self, reader):
        """The thread. The system writes a signal's number to this pipe at once."""
        interrupted = deadline = math.inf
        while True:
            left = None if deadline == math.inf else max(0, deadline - time.monotonic())
            if not select.select([reader], [], [], left)[0]:
                if self.stepping and not self.stopped_by:
                    self.world.exit(f"the step did not end within {GRACE_S} s of a signal", code=1)
                deadline = math.inf  # the step has ended, and saving may take its time
                continue
            number, now = os.read(reader, 1), time.monotonic()
            if not number:
                return os.close(reader)
            # torchrun passes the first Ctrl-C on as SIGINT and the second as SIGTERM. Where the
            # terminal signals this process, too, one Ctrl-C is two signals within a moment
            if number[0] in (signal.SIGINT, signal.SIGTERM) and now - interrupted > 1:
                self.world.exit("interrupted twice", code=130)
            if number[0] == signal.SIGINT:
                if interrupted == math.inf and self.world.main and self.stepping:
                    with contextlib.suppress(OSError):  # the terminal was closed
                        tqdm.write("Ctrl-C: this step ends and is saved; once more leaves at once",
                                   file=sys.stderr)
                interrupted = min(now, interrupted)
            if number[0] == signal.SIGHUP:
                self.leave_terminal()
            if number[0] != signal.SIGUSR1 and self.world.distributed:
                deadline = min(deadline, now + GRACE_S)

    def leave_terminal(self):
        """Redirect output to nowhere: writing to a closed terminal is an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in self.terminals:
            os.dup2(nowhere, stream)
        os.close(nowhere)

    def stop(self):
        """Called once a step: the name of the signal upon which all stop now, or None."""
        if self.world.distributed:
            agreed = self.pending() if self.pending else 0
            self.pending = self.world.maximum_later(
                signal.Signals[self.heard].value if self.heard else 0)
            self.stopped_by = signal.Signals(agreed).name if agreed else None
        else:
            self.stopped_by = self.heard
        return self.stopped_by

    def end_steps(self):
        """Called after the last step on every rank. No deadline from here on: what is left is to
        save."""
        self.stepping = False
        if self.pending:
            self.pending()

    def __exit__(self, *_):
        """Restore the handlers or, where the process is ending, ignore all signals: among several
        processes it may still wait for the others, perhaps for a checkpoint."""
        signal.set_wakeup_fd(-1)
        ending = self.heard or self.stopped_by or self.world.distributed
        for number, before in self.before.items():
            signal.signal(number, signal.SIG_IGN if ending else before)
        os.close(self.writer)


def ignore_signals():
    """For reading processes: the training process decides when they end."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def propagate_nonfinite(loss):
    """The loss (scalar) with a gradient that is NaN where the loss is not finite: an error that
    overflows has weight 0, and so gradient 0. A finite loss times 1 keeps its bits."""
    return loss * (1 + 0 * loss.detach())


class Guard:
    """Skips updates whose gradient is not finite, without a synchronisation per step.

    The verdict stays on the device, where the fused optimiser reads it as its ``found_inf`` (made
    for loss scaling); ``check`` reads it on the host, where the host synchronises anyway. Up to
    ``tolerance`` steps in a row are skipped; one more stops the run, and nothing is updated then.
    """

    def __init__(self, world, tolerance):
        self.world, self.tolerance = world, tolerance
        # Skipped steps in a row, the step of the stop, whether this rank's loss was bad there
        self.in_a_row, self.stopped_at, self.bad_loss = torch.zeros(3, device=world.device)

    def should_skip(self, step, loss, norm):
        """1.0 if this step's update must be skipped, else 0.0: a float32 scalar on the device.

        loss: this rank's, a scalar on the device. norm: that of the averaged gradient of
        ``propagate_nonfinite`` losses, a scalar: a loss that is not finite on one rank makes it so
        on all.
        """
        bad = ~torch.isfinite(norm)
        self.in_a_row = (self.in_a_row + 1) * bad
        stops = (self.in_a_row > self.tolerance) & (self.stopped_at == 0)
        self.stopped_at = torch.where(stops, step, self.stopped_at)
        self.bad_loss = torch.where(stops, ~torch.isfinite(loss), self.bad_loss)
        return (bad | (self.stopped_at > 0)).float()

    def check(self):
        """Raises RunError once stopped."""
        step, bad_loss = torch.stack([self.stopped_at, self.bad_loss]).tolist()
        if step:
            ranks = [str(rank) for rank, bad in enumerate(self.world.gather(bad_loss)) if bad]
            what = (f"loss on rank {', '.join(ranks)}" if ranks
                    else "gradient norm, though every rank's loss was finite")
            raise RunError(
                f"step {step:.0f}: not a finite number: {what}; no update was made and the last "
                f"checkpoint is intact; lower --lr, try --precision fp32, or allow some such "
                f"steps in a row with --skip-nonfinite")
