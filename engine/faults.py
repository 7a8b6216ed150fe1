"""What ends a run before its last step: signals and numbers that are not finite."""

import math
import os
import select
import signal
import threading
import time

import torch

from engine.options import RunError

ASKED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
GRACE_S = 20  # below the 30 s that torchrun gives a process between SIGTERM and SIGKILL


class Signals:
    """Within ``with``: notes the signals of ASKED, upon which all stop after the same step.

    Processes hear of a signal at different moments, so each step they exchange, unwaited for, what
    they heard; the answer is read a step later, by all alike: several processes stop one step later
    than a single one. What cannot wait for the main thread, which may be inside a collective, a
    thread sees to: a second Ctrl-C ends the process, and one that cannot finish its step, because
    another process died, ends after GRACE_S seconds.
    """

    def __init__(self, world):
        self.world, self.heard, self.pending, self.asked = world, None, None, None
        self.stepping = True

    def __enter__(self):
        reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.before = {number: signal.signal(number, self.hear) for number in ASKED
                       if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}
        self.terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        threading.Thread(target=self.watch, args=(reader,), daemon=True).start()
        return self

    def hear(self, number, frame):
        """Python calls this between two operations of the main thread."""
        self.heard = signal.Signals(number).name

    def watch(self, reader):
        """The system writes here at once, also while the main thread waits for a process."""
        interrupted = deadline = math.inf
        while True:
            left = max(0, deadline - time.monotonic()) if deadline < math.inf else None
            if not select.select([reader], [], [], left)[0]:
                if self.stepping and not self.asked:
                    self.world.leave(f"the step did not end within {GRACE_S} s of a signal", code=1)
                deadline = math.inf  # what is left is to save
                continue
            number, now = os.read(reader, 1), time.monotonic()
            if not number:
                return os.close(reader)
            # torchrun passes the first Ctrl-C on as it is and the second as SIGTERM; where the
            # terminal reaches this process, too, one Ctrl-C is two signals within a moment
            if number[0] in (signal.SIGINT, signal.SIGTERM) and now - interrupted > 1:
                self.world.leave("interrupted twice", code=130)
            if number[0] == signal.SIGINT:
                interrupted = min(now, interrupted)
            if number[0] == signal.SIGHUP:
                self.leave_terminal()
            if number[0] != signal.SIGUSR1 and self.world.distributed:
                deadline = min(deadline, now + GRACE_S)

    def leave_terminal(self):
        """A terminal that is closed takes no more lines: to write there is an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in self.terminals:
            os.dup2(nowhere, stream)
        os.close(nowhere)

    def stop(self):
        """Called once a step: the name of the signal upon which to stop now, or None."""
        if self.world.distributed:
            agreed = self.pending.result() if self.pending else 0
            number = signal.Signals[self.heard].value if self.heard else 0
            self.pending = self.world.maximum(number)
            self.asked = signal.Signals(agreed).name if agreed else None
        else:
            self.asked = self.heard
        return self.asked

    def close(self):
        """After the last step, once all processes are there."""
        self.steps_end()
        if self.pending:
            self.pending.result()

    def steps_end(self):
        """What is left is to save, for which there is no deadline."""
        self.stepping = False

    def __exit__(self, *_):
        """Signals do what they did before or, where the process is ending, nothing.

        It is if a signal came, and among several processes: one that waits for the others at the
        end, perhaps for a checkpoint, must not die there.
        """
        signal.set_wakeup_fd(-1)
        ending = self.heard or self.asked or self.world.distributed
        for number, before in self.before.items():
            signal.signal(number, signal.SIG_IGN if ending else before)
        os.close(self.writer)


def ignore_signals():
    """For processes that read data: the training process decides when they end."""
    for number in ASKED:
        signal.signal(number, signal.SIG_IGN)


def propagate_nonfinite(loss):
    """The loss, with a gradient that is NaN wherever the loss is not finite.

    Where the error overflows, its adaptive weight is 0 and so is its gradient: the loss alone would
    tell, and only on its own process. A finite loss times 1 keeps its bits.
    """
    return loss * (1 + 0 * loss.detach())


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

    def should_skip(self, step, loss, norm):
        """1.0 where this step's update must be left out, else 0.0, a scalar on the device.

        norm, of the averaged gradient of ``telling`` losses, is not finite on any process if the
        loss is not on one.
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
