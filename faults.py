"""What ends a run before its last step, and how it ends well: signals and numbers that are not
finite."""

import math
import os
import signal
import sys
import threading
import time

import torch

from runtime import RunError

ASKED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE_S = 20  # below the 30 s that torchrun gives a process between SIGTERM and SIGKILL


class Signals:
    """Notes SIGTERM, SIGUSR1 and SIGINT, upon which all processes stop after the same step.

    Processes hear of a signal at different moments, so each step they exchange, unwaited for, what
    they heard; the answer is read a step later, by all alike. A second SIGINT stops at once. A
    process that cannot finish its step, because another one died, is ended after GRACE_S seconds.
    """

    def __init__(self, world):
        self.world, self.heard, self.pending, self.finished = world, None, None, False
        self.first_interrupt = math.inf
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.reader, self.writer = reader, writer
        for number in ASKED:
            signal.signal(number, self.hear)
        threading.Thread(target=self.watch, daemon=True).start()

    def hear(self, number, frame):
        """Python calls this between two operations of the main thread."""
        now = time.monotonic()
        if number == signal.SIGINT:
            # Ctrl-C reaches a process twice under torchrun, from the terminal and from the agent
            if now - self.first_interrupt > 1:
                raise KeyboardInterrupt
            self.first_interrupt = min(now, self.first_interrupt)
        self.heard = signal.Signals(number).name

    def watch(self):
        """The system writes here at once, also while the main thread waits for another process."""
        while (number := os.read(self.reader, 1)[0]) not in ASKED:
            pass
        time.sleep(GRACE_S)
        if not self.finished:
            name = signal.Signals(number).name
            print(f"rank {self.world.rank}: {name} came and the step did not end within {GRACE_S} "
                  f"s; leaving without a new checkpoint", file=sys.stderr, flush=True)
            os._exit(1)

    def stop(self):
        """Called once a step: the name of the signal upon which to stop now, or None."""
        if not self.world.distributed:
            return self.heard
        agreed = self.pending.result() if self.pending else 0
        number = signal.Signals[self.heard].value if self.heard else 0
        self.pending = self.world.maximum(number)
        return signal.Signals(agreed).name if agreed else None

    def close(self):
        """Signals have their usual effect again."""
        self.finished = True
        if self.pending:
            self.pending.result()
        signal.set_wakeup_fd(-1)
        for number in ASKED:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore_signals(_):
    """For processes that read data: the training process decides when they end."""
    for number in ASKED:
        signal.signal(number, signal.SIG_IGN)


class Guard:
    """Keeps a step with a non-finite gradient from the weights, without a synchronisation.

    The verdict stays on the device, where the fused optimiser reads it (its ``found_inf``, made
    for loss scaling); ``check`` reads it on the host, whenever the host synchronises anyway.
    Up to ``tolerance`` such steps in a row are left out; from the next one on nothing is updated.
    """

    def __init__(self, world, tolerance):
        self.world, self.tolerance = world, tolerance
        # steps in a row that were not finite, all of them, the step of the stop, this rank's loss
        self.state = torch.zeros(4, device=world.device)
        self.skipped = 0

    def admit(self, step, loss, norm):
        """1.0 where this step's update must be left out, else 0.0, a scalar on the device.

        norm, of the averaged gradient, is not finite on any process if the loss is not on one.
        """
        row, total, stop, own = self.state
        bad = (~torch.isfinite(norm)).float()
        stopped = stop > 0
        row = torch.where(stopped, row, (row + 1) * bad)
        now = ~stopped & (row > self.tolerance)
        own = torch.where(now, (~torch.isfinite(loss)).float(), own)
        stop = torch.where(now, torch.full_like(stop, step), stop)
        self.state = torch.stack([row, total + bad, stop, own])
        return torch.maximum(bad, (stop > 0).float())

    def check(self):
        """The count of steps left out since the last check. Raises RunError once stopped."""
        row, total, stop, own = self.state.tolist()
        if stop:
            ranks = [i for i, value in enumerate(self.world.gather(own)) if value]
            what = (f"loss on rank {', '.join(map(str, ranks))}" if ranks
                    else "gradient norm, though every rank's loss was finite")
            raise RunError(
                f"step {stop:.0f}: not a finite number: {what}; no update was made and the last "
                f"checkpoint is intact; lower --lr, try --precision fp32, or allow some such "
                f"steps in a row with --skip-nonfinite")
        skipped, self.skipped = total - self.skipped, total
        return int(skipped)
