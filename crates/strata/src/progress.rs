//! Progress bars on standard error, where that is a terminal.

use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use strata_image::Progress;
use strata_image::oci::Bars;

/// One bar. It draws nothing before there is something to wait for, and goes when dropped.
#[derive(Default)]
pub(crate) struct Bar {
    among: Option<MultiProgress>,
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
        let bar = if let Some(others) = &self.among {
            others.add(bar)
        } else {
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar
        };
        bar.enable_steady_tick(Duration::from_millis(100));
        self.bar = Some(bar);
    }

    fn advance(&mut self, position: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(position);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A bar for each of several things that go on at once.
#[derive(Default)]
pub(crate) struct Rows(MultiProgress);

impl Bars for Rows {
    fn bar(&self) -> Box<dyn Progress + Send> {
        Box::new(Bar {
            among: Some(self.0.clone()),
            bar: None,
        })
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
