"""What a person sees while training: a bar on a terminal, a line now and then in a log file, nothing on other ranks."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from training.metrics import Row


class ProgressBar:
    """Loss, tokens per second, model FLOPs utilisation and time left."""

    def __init__(self, steps: int, start: int, visible: bool, seconds_between_lines: float = 10.0) -> None:
        self.steps, self.start, self.visible, self.pause = steps, start, visible, seconds_between_lines
        self.bar = (
            tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)
            if visible and sys.stderr.isatty()
            else None
        )
        self._begin = self._last = time.monotonic()

    def show(self, row: Row) -> None:
        """Report a logged row."""
        if not self.visible:
            return
        done, now = row["step"], time.monotonic()
        text = f"loss {row['loss']:.4f}" if "loss" in row else ""
        if "eval/loss" in row:
            text += f", held-out {row['eval/loss']:.4f} ({row['eval/bits_per_byte']:.3f} bits/byte)"
        if "tokens_per_second" in row:
            text += f", {row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.0%}"
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(done - self.bar.n)
        elif now - self._last >= self.pause or done == self.steps or done == self.start + 1 or "eval/loss" in row:
            self._last = now
            left = (now - self._begin) / max(1, done - self.start) * (self.steps - done)
            print(f"step {done}/{self.steps}: {text}, {left:.0f} s left", flush=True)

    def note(self, text: str) -> None:
        """Say something that a person should read."""
        if self.bar is not None:
            self.bar.write(text)
        elif self.visible:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()
