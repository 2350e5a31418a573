//! A cell of a matrix: one choice of everything. Its flags, its settings in the report, its folder.

use crate::failure::Result;
use crate::names::{ADJOINTS, CODECS, PRECISIONS, SOLVERS, adjoint_word, parser};
use crate::problem::FIELDS;
use clap::Args;
use serde_json::Value;

/// The lists of a matrix: every choice of one from each is a cell.
#[derive(Args, Clone, Debug)]
pub(crate) struct Lists {
    /// What is integrated.
    #[arg(long, value_delimiter = ',', default_value = "mlp", value_parser = parser(FIELDS))]
    field: Vec<String>,
    /// How one step is made.
    #[arg(long, value_delimiter = ',', default_value = "rk4", value_parser = parser(SOLVERS))]
    solver: Vec<String>,
    /// How many equal steps.
    #[arg(long, value_delimiter = ',', default_value = "64", value_parser = at_least_one)]
    steps: Vec<usize>,
    /// The dtypes of field, trajectory and sums.
    #[arg(long, value_delimiter = ',', default_value = "f32", value_parser = parser(PRECISIONS))]
    precision: Vec<String>,
    /// How kept states are encoded.
    #[arg(long, value_delimiter = ',', default_value = "storage", value_parser = parser(CODECS))]
    codec: Vec<String>,
    /// How gradients come back: a name, and a number for those that take one (checkpoints:8).
    #[arg(long, value_delimiter = ',', default_value = "discrete", value_parser = adjoint_word, long_help = adjoints())]
    adjoint: Vec<String>,
    /// Rows of the batch.
    #[arg(long, value_delimiter = ',', default_value = "256", value_parser = at_least_one)]
    batch: Vec<usize>,
    /// Where tensors live: cpu, cuda:0 …
    #[arg(long, value_delimiter = ',', default_value = "cpu")]
    device: Vec<String>,
}

/// What `--help` says of adjoints, whose words clap does not list since some have a number.
fn adjoints() -> String {
    let rows = ADJOINTS.iter().map(|row| format!("- {}: {}", row.name, row.says));
    format!("How gradients come back\n\nPossible values:\n{}", rows.collect::<Vec<_>>().join("\n"))
}

/// clap's range parsers know no `usize`.
fn at_least_one(word: &str) -> std::result::Result<usize, String> {
    match word.parse() {
        Ok(0) => Err("at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(error.to_string()),
    }
}

/// One of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) field: String,
    pub(crate) solver: String,
    pub(crate) steps: usize,
    pub(crate) precision: String,
    pub(crate) codec: String,
    pub(crate) adjoint: String,
    pub(crate) batch: usize,
    pub(crate) device: String,
}

impl Lists {
    /// All cells: steps vary fastest, then precisions, codecs, adjoints, so that neighbours are worth comparing.
    pub(crate) fn cells(&self) -> Vec<Cell> {
        let lists = [&self.field, &self.solver, &self.precision, &self.codec, &self.adjoint, &self.device];
        let count: usize = lists.iter().map(|list| list.len()).product::<usize>() * self.steps.len() * self.batch.len();
        (0..count).map(|number| self.cell(number)).collect()
    }

    /// The cell of that number, whose digits choose from each list.
    fn cell(&self, mut number: usize) -> Cell {
        let mut digit = |base: usize| {
            let digit = number % base;
            number /= base;
            digit
        };
        Cell {
            steps: self.steps[digit(self.steps.len())],
            precision: self.precision[digit(self.precision.len())].clone(),
            codec: self.codec[digit(self.codec.len())].clone(),
            adjoint: self.adjoint[digit(self.adjoint.len())].clone(),
            solver: self.solver[digit(self.solver.len())].clone(),
            batch: self.batch[digit(self.batch.len())],
            field: self.field[digit(self.field.len())].clone(),
            device: self.device[digit(self.device.len())].clone(),
        }
    }

    /// The only cell.
    pub(crate) fn only(&self) -> Result<Cell> {
        match <[Cell; 1]>::try_from(self.cells()) {
            Ok([cell]) => Ok(cell),
            Err(cells) => Err(format!("--in-process measures one cell, and these flags make {}", cells.len()).into()),
        }
    }
}

impl Cell {
    /// What each flag says, in the order of the flags.
    pub(crate) fn settings(&self) -> [(&'static str, Value); FLAGS.len()] {
        let says: [Value; FLAGS.len()] = [
            self.field.as_str().into(),
            self.solver.as_str().into(),
            self.steps.into(),
            self.precision.as_str().into(),
            self.codec.as_str().into(),
            self.adjoint.as_str().into(),
            self.batch.into(),
            self.device.as_str().into(),
        ];
        std::array::from_fn(|n| (FLAGS[n], says[n].clone()))
    }

    /// The flags that make this cell alone.
    pub(crate) fn flags(&self) -> Vec<String> {
        self.settings().into_iter().flat_map(|(name, value)| [format!("--{name}"), word(&value)]).collect()
    }

    /// Its folder; the number keeps cells in order.
    pub(crate) fn folder(&self, number: usize) -> String {
        let words: Vec<_> = self.settings().iter().map(|(_, value)| word(value).replace(':', "")).collect();
        format!("{number:03}-{}", words.join("-"))
    }
}

/// The flags, in the order in which they make names.
pub(crate) const FLAGS: [&str; 8] = ["field", "solver", "steps", "precision", "codec", "adjoint", "batch", "device"];

/// Names for choices of the flags: what each says where they differ, and nothing if they do not.
pub(crate) fn told_apart(choices: &[[Option<String>; FLAGS.len()]]) -> Vec<String> {
    let differs = |flag: &usize| choices.iter().any(|choice| choice[*flag] != choices[0][*flag]);
    let flags: Vec<usize> = (0..FLAGS.len()).filter(differs).collect();
    let said = |flag: usize, word: &str| match word.parse::<f64>() {
        Ok(_) => format!("{} {word}", FLAGS[flag]),
        Err(_) => word.to_owned(),
    };
    let name = |choice: &[Option<String>; FLAGS.len()]| {
        let words = flags.iter().filter_map(|&flag| Some(said(flag, choice[flag].as_ref()?)));
        words.collect::<Vec<_>>().join(", ")
    };
    choices.iter().map(name).collect()
}

/// A setting without the quotes of JSON.
pub(crate) fn word(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
