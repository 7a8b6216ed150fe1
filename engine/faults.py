"""What ends a run before its last step: signals, and numbers that are not finite."""

import math
import os
import select
import signal
import threading
import time

import torch

from engine.errors import RunError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
GRACE_S = 20  # below the 30 s that torchrun gives a process between SIGTERM and SIGKILL


class Signals:
    """Within ``with``, each of STOP_SIGNALS stops all ranks after the same step.

    Each step starts an asynchronous max-reduce of signal numbers and reads that of the step before,
    so several processes stop a step later. If the main thread hangs in a collective, a thread ends
    the process: at a second Ctrl-C, or GRACE_S after a signal, as another process died.
    """

    def __init__(self, world):
        self.world, self.steps_ended = world, False
        self.received = 0  # the number of this process's last signal
        self.name = None  # of the signal that all ranks stop for
        self.maximum = lambda: 0  # the max-reduce of the step before

    def __enter__(self):
        reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self.wakeup = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
            # nohup ignores SIGHUP; so does a run under it
            self.before = {number: signal.signal(number, self.receive) for number in STOP_SIGNALS
                           if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}
        threading.Thread(target=self.watch, args=(reader,), daemon=True).start()
        return self

    def receive(self, number, frame):
        """The handler, which Python calls in the main thread, between two of its operations."""
        self.received = number

    def watch(self, reader):
        """The thread. The system writes a signal's number to this pipe at once."""
        interrupted = deadline = math.inf
        while True:
            left = None if deadline == math.inf else max(0, deadline - time.monotonic())
            if not select.select([reader], [], [], left)[0]:
                if not self.steps_ended and not self.name:
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
                interrupted = min(now, interrupted)
            if number[0] != signal.SIGUSR1 and self.world.distributed:
                deadline = min(deadline, now + GRACE_S)

    def stop(self):
        """Called once a step: the name of the signal for which all stop now, or None."""
        number = self.received
        if self.world.distributed:
            number, self.maximum = self.maximum(), self.world.maximum_later(self.received)
        self.name = signal.Signals(number).name if number else None
        return self.name

    def end_steps(self):
        """Called after the last step on every rank: saving, which is left, has no deadline."""
        self.steps_ended = True
        self.maximum()

    def __exit__(self, *_):
        """Restore the handlers or, where the process is ending, ignore all signals: among several
        processes it may still wait for the others, perhaps for a checkpoint."""
        if self.before:
            signal.set_wakeup_fd(self.wakeup)
        ending = self.received or self.name or self.world.distributed
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

    Up to ``tolerance`` steps in a row are skipped; one more stops the run, and no weight is updated
    from then on. The verdict stays on the device, as the optimiser's ``found_inf``.
    """

    def __init__(self, world, tolerance):
        self.world, self.tolerance = world, tolerance
        # Skipped steps in a row, the step of the stop, whether this rank's loss was bad there
        self.in_a_row, self.stopped_at, self.bad_loss = torch.zeros(3, device=world.device)

    def judge(self, step, loss, norm):
        """Count a step. 1.0 if its update must be skipped, else 0.0: float32, on the device.

        loss: this rank's, a scalar on the device. norm: a scalar, of the averaged gradient of
        ``propagate_nonfinite`` losses: one rank's bad loss makes it so on all.
        """
        bad = ~torch.isfinite(norm)
        self.in_a_row = (self.in_a_row + 1) * bad
        stops = (self.in_a_row > self.tolerance) & (self.stopped_at == 0)
        self.stopped_at = torch.where(stops, step, self.stopped_at)
        self.bad_loss = torch.where(stops, ~torch.isfinite(loss), self.bad_loss)
        return (bad | (self.stopped_at > 0)).float()

    def raise_if_stopped(self):
        """Raises RunError once stopped; synchronises."""
        step, bad_loss = torch.stack([self.stopped_at, self.bad_loss]).tolist()
        if step:
            ranks = [str(rank) for rank, bad in enumerate(self.world.gather(bad_loss)) if bad]
            what = (f"loss on rank {', '.join(ranks)}" if ranks
                    else "gradient norm, though every rank's loss was finite")
            raise RunError(
                f"step {step:.0f}: not a finite number: {what}; no update was made, the last "
                f"checkpoint is intact; lower --lr, try --precision fp32 or --skip-nonfinite")
