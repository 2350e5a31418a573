//! Studies: tables of what the crate's choices cost, made by the crate itself.

mod codecs;

use clap::Subcommand;

/// Which study.
#[derive(Subcommand)]
pub(crate) enum Study {
    /// Gradient errors of the trajectory's codecs, as CSV.
    Codecs(codecs::Codecs),
}

impl Study {
    /// The table.
    pub(crate) fn table(self) -> candle_ode::Result<String> {
        match self {
            Self::Codecs(codecs) => codecs.table(),
        }
    }
}
