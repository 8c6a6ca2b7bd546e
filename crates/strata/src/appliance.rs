//! The default appliance, with a progress bar where standard error is a terminal.

use strata_image::{Appliance, Cache, Error};

use crate::progress::Bar;

/// The default appliance of this user, built first where that is needed.
pub(crate) fn get() -> Result<Appliance, Error> {
    Cache::of_user()?.appliance(&mut Bar::default())
}
