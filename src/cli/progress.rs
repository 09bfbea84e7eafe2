//! How far long work has come: a bar on a terminal, now and then a line elsewhere. All of it on standard error, so that
//! what a command prints can be piped on.

use std::cell::{Cell, RefCell};
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{HumanCount, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::client::POLL;

/// Where there is no terminal, a line is printed at most this often, in polls.
const LINE_EVERY: u32 = 10;

/// Work that somebody waits for.
pub struct Waiting {
    bar: ProgressBar,
    on_terminal: bool,
    polls: Cell<u32>,
    said: RefCell<String>,
    /// The most that was ever open.
    most: Cell<u64>,
}

impl Waiting {
    pub fn begin() -> Self {
        let on_terminal = std::io::stderr().is_terminal();
        let target = if on_terminal {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(None, target);
        bar.set_style(style("{spinner} {wide_msg} {elapsed}"));
        bar.enable_steady_tick(Duration::from_millis(100));
        Self {
            bar,
            on_terminal,
            polls: Cell::new(0),
            said: RefCell::default(),
            most: Cell::new(0),
        }
    }

    /// What is waited for.
    pub fn say(&self, what: &str) {
        self.bar.set_message(what.to_owned());
        self.line(what);
    }

    /// So much of it is done; in numbers too.
    pub fn share(&self, what: &str, done: u64, total: u64) {
        let text = format!("{} of {} {what}", HumanCount(done), HumanCount(total));
        self.part(if total == 0 { what } else { &text }, done, total);
    }

    /// So much of it is done; the text says how much.
    pub fn part(&self, what: &str, done: u64, total: u64) {
        if total > 0 && self.bar.length() != Some(total) {
            self.bar.set_length(total);
            self.bar.set_style(style("{spinner} [{bar:24}] {wide_msg} {elapsed}"));
        }
        self.bar.set_position(done.min(total));
        self.say(what);
    }

    /// So much is left; it may grow.
    pub fn backlog(&self, what: &str, left: u64) {
        self.most.set(self.most.get().max(left));
        if left == 0 && self.most.get() == 0 {
            return self.say(what);
        }
        self.share(&format!("drained; {what}"), self.most.get() - left, self.most.get());
    }

    /// Until the next look.
    pub fn pause(&self) {
        self.polls.set(self.polls.get().saturating_add(1));
        std::thread::sleep(POLL);
    }

    pub fn end(&self) {
        self.bar.finish_and_clear();
    }

    fn line(&self, line: &str) {
        if self.on_terminal
            || (!self.said.borrow().is_empty() && self.polls.get() < LINE_EVERY)
            || *self.said.borrow() == line
        {
            return;
        }
        eprintln!("{line}");
        line.clone_into(&mut self.said.borrow_mut());
        self.polls.set(0);
    }
}

/// Until the next look, where there is nothing to show.
pub fn pause() {
    std::thread::sleep(POLL);
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.end();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .expect("a template of ours")
        .progress_chars("=> ")
}
