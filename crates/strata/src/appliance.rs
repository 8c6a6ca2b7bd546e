//! The default appliance, with a progress bar where standard error is a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use strata_image::{Appliance, Cache, Error, Progress};

/// The default appliance of this user, built first where that is needed.
pub(crate) fn get() -> Result<Appliance, Error> {
    let mut bar = Bar { bar: None };
    let appliance = Cache::of_user()?.appliance(&mut bar);
    if let Some(bar) = bar.bar {
        bar.finish_and_clear();
    }
    appliance
}

/// Draws nothing before there is something to wait for.
struct Bar {
    bar: Option<ProgressBar>,
}

impl Progress for Bar {
    fn step(&mut self, what: &str, total: Option<u64>) {
        tracing::info!("{what}");
        if let Some(done) = self.bar.take() {
            done.finish_and_clear();
        }
        // Drawn from here on: half-made bars would flicker on the terminal.
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::hidden())
            .with_style(style(total.is_some()))
            .with_message(what.to_owned());
        bar.set_draw_target(ProgressDrawTarget::stderr());
        bar.enable_steady_tick(Duration::from_millis(100));
        self.bar = Some(bar);
    }

    fn advance(&mut self, position: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(position);
        }
    }
}

fn style(with_length: bool) -> ProgressStyle {
    let template = if with_length {
        "{spinner} {msg} [{wide_bar}] {binary_bytes}/{binary_total_bytes}"
    } else {
        "{spinner} {msg}"
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
