//! From our errors to Candle's and back, on the way through `loss.backward()`.

use super::OdeError;

impl From<OdeError> for candle_core::Error {
    fn from(error: OdeError) -> Self {
        match error {
            OdeError::Candle(inner) => inner,
            other => Self::WrappedContext { wrapped: Box::new(other), context: "candle-ode".into() },
        }
    }
}

impl From<candle_core::Error> for OdeError {
    fn from(error: candle_core::Error) -> Self {
        use candle_core::Error as C;
        match error {
            C::WrappedContext { wrapped, context } => match wrapped.downcast::<Self>() {
                Ok(ours) => *ours,
                Err(wrapped) => match wrapped.downcast::<C>() {
                    Ok(inner) if holds_ours(&inner) => Self::from(*inner),
                    Ok(inner) => Self::Candle(C::WrappedContext { wrapped: inner, context }),
                    Err(wrapped) => Self::Candle(C::WrappedContext { wrapped, context }),
                },
            },
            C::Context { inner, .. } | C::WithPath { inner, .. } | C::WithBacktrace { inner, .. }
                if holds_ours(&inner) =>
            {
                Self::from(*inner)
            }
            other => match without_backward(&other) {
                Some(op) => Self::no_backward(op),
                None => Self::Candle(other),
            },
        }
    }
}

/// The op that Candle cannot differentiate. It says so in two ways.
fn without_backward(error: &candle_core::Error) -> Option<&str> {
    match error {
        candle_core::Error::BackwardNotSupported { op } => Some(op),
        candle_core::Error::Msg(text) => text.strip_prefix("backward not supported for "),
        _ => None,
    }
}

fn holds_ours(error: &candle_core::Error) -> bool {
    use candle_core::Error as C;
    match error {
        // What `.context(..)` on a `Result` makes: ours, or Candle's around ours.
        C::WrappedContext { wrapped, .. } => {
            wrapped.is::<OdeError>() || wrapped.downcast_ref::<C>().is_some_and(holds_ours)
        }
        C::Context { inner, .. } | C::WithPath { inner, .. } | C::WithBacktrace { inner, .. } => holds_ours(inner),
        other => without_backward(other).is_some(),
    }
}

impl OdeError {
    /// Names the differentiable twin of a Candle op that has no backward pass.
    fn no_backward(op: &str) -> Self {
        let instead = match op {
            "layer-norm" => "use candle_ode::ops::layer_norm, which takes the same arguments",
            "rms-norm" => "use candle_ode::ops::rms_norm, which takes the same arguments",
            "softmax-last-dim" => "use candle_ode::ops::softmax",
            "sigmoid" => "use candle_ode::ops::sigmoid",
            _ => "write it with ops that have one, or implement `VectorField` with your own pullback",
        };
        Self::NoBackward { op: op.to_owned(), instead }
    }

    /// f depends on something that Candle's graph of f does not reach.
    pub(crate) fn graph_cut(from: &str) -> Self {
        let op = format!("whatever leads from {from} to f(t, y), which cuts the graph");
        let instead = "candle-nn's softmax_last_dim, layer_norm, rms_norm and rotary embeddings do so without a word: \
                       use candle_ode::ops::softmax and candle_ode::ops::layer_norm, or ops made of others; \
                       where it is meant, freeze the parameter, or tell the field so with .stops_gradients()";
        Self::NoBackward { op, instead }
    }
}
