//! The default appliance with a progress bar, drawn on the terminal only.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::Duration;

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
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        bar.reset();
        if let Some(total) = total {
            bar.set_length(total);
        } else {
            bar.unset_length();
        }
        bar.set_style(style(total.is_some()));
        bar.set_message(what.to_owned());
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
