//! The explicit Runge–Kutta methods that come with the crate: a tableau and a unit struct each.

use super::explicit::ExplicitRungeKutta;
use super::interpolant::quartic;
use super::tableau::Tableau;
use std::sync::LazyLock;

macro_rules! method {
    ($(#[$doc:meta])* $name:ident, $order:literal, $rows:expr, $b:expr $(, embedded $embedded:expr)? $(, interpolant $interpolant:expr)?) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name;

        impl ExplicitRungeKutta for $name {
            fn tableau(&self) -> &Tableau {
                static TABLEAU: LazyLock<Tableau> = LazyLock::new(|| {
                    let rows: &[&[f64]] = $rows;
                    let tableau = Tableau::new(stringify!($name), $order, rows, &$b);
                    $(let tableau = tableau.and_then(|tableau| tableau.with_embedded(&$embedded));)?
                    $(let tableau = tableau.and_then(|tableau| {
                        let polynomials = $interpolant(tableau.weights());
                        tableau.with_interpolant(&polynomials.iter().map(|row| &row[..]).collect::<Vec<_>>())
                    });)?
                    // The tableaus of this file are constants, each checked by `every_tableau_checks` below.
                    tableau.unwrap_or_else(|error| unreachable!("{error}"))
                });
                &TABLEAU
            }
        }
    };
}

method! {
    /// Euler's method, order 1, one stage: y⁺ = y + h f(t, y).
    Euler, 1, &[], [1.0]
}
method! {
    /// The explicit midpoint rule, order 2, two stages.
    Midpoint, 2, &[&[0.5]], [0.0, 1.0]
}
method! {
    /// Heun's method (explicit trapezoid), order 2, two stages, embedded Euler.
    Heun, 2, &[&[1.0]], [0.5, 0.5], embedded [1.0, 0.0]
}
method! {
    /// Ralston's method, order 2, two stages, least truncation error bound.
    ///
    /// # Reference
    /// A. Ralston, *Math. Comp.* 16 (1962).
    Ralston, 2, &[&[2.0 / 3.0]], [0.25, 0.75], embedded [1.0, 0.0]
}
method! {
    /// Kutta's third-order method, three stages.
    ///
    /// # Reference
    /// W. Kutta, *Z. Math. Phys.* 46 (1901).
    Rk3, 3, &[&[0.5], &[-1.0, 2.0]], [1.0 / 6.0, 2.0 / 3.0, 1.0 / 6.0]
}
method! {
    /// The classic fourth-order Runge–Kutta method, four stages.
    ///
    /// # Reference
    /// W. Kutta, *Z. Math. Phys.* 46 (1901).
    Rk4, 4, &[&[0.5], &[0.0, 0.5], &[0.0, 0.0, 1.0]], [1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0]
}
method! {
    /// The 3/8 rule, order 4, four stages: what torchdiffeq calls `rk4`.
    ///
    /// # Reference
    /// W. Kutta, *Z. Math. Phys.* 46 (1901).
    ThreeEighths, 4,
    &[&[1.0 / 3.0], &[-1.0 / 3.0, 1.0], &[1.0, -1.0, 1.0]],
    [1.0 / 8.0, 3.0 / 8.0, 3.0 / 8.0, 1.0 / 8.0]
}
method! {
    /// Bogacki and Shampine's method, order 3, four stages (the last is the first of the next step), embedded order 2.
    ///
    /// # Reference
    /// P. Bogacki, L. F. Shampine, *Appl. Math. Lett.* 2 (1989).
    Bosh3, 3,
    &[&[0.5], &[0.0, 0.75], &[2.0 / 9.0, 1.0 / 3.0, 4.0 / 9.0]],
    [2.0 / 9.0, 1.0 / 3.0, 4.0 / 9.0, 0.0],
    embedded [7.0 / 24.0, 0.25, 1.0 / 3.0, 0.125]
}
method! {
    /// Dormand and Prince's method, order 5, seven stages (the last is the first of the next step), embedded order 4.
    ///
    /// # Reference
    /// J. R. Dormand, P. J. Prince, *J. Comput. Appl. Math.* 6 (1980); interpolant of order 4: L. F. Shampine, *Math.
    /// Comp.* 46 (1986).
    Dopri5, 5,
    &[
        &[1.0 / 5.0],
        &[3.0 / 40.0, 9.0 / 40.0],
        &[44.0 / 45.0, -56.0 / 15.0, 32.0 / 9.0],
        &[19372.0 / 6561.0, -25360.0 / 2187.0, 64448.0 / 6561.0, -212.0 / 729.0],
        &[9017.0 / 3168.0, -355.0 / 33.0, 46732.0 / 5247.0, 49.0 / 176.0, -5103.0 / 18656.0],
        &[35.0 / 384.0, 0.0, 500.0 / 1113.0, 125.0 / 192.0, -2187.0 / 6784.0, 11.0 / 84.0],
    ],
    [35.0 / 384.0, 0.0, 500.0 / 1113.0, 125.0 / 192.0, -2187.0 / 6784.0, 11.0 / 84.0, 0.0],
    embedded [
        5179.0 / 57600.0, 0.0, 7571.0 / 16695.0, 393.0 / 640.0, -92097.0 / 339200.0, 187.0 / 2100.0, 1.0 / 40.0
    ],
    interpolant |b: &[f64]| quartic(b, &[
        -12715105075.0 / 11282082432.0, 0.0, 87487479700.0 / 32700410799.0, -10690763975.0 / 1880347072.0,
        701980252875.0 / 199316789632.0, -1453857185.0 / 822651844.0, 69997945.0 / 29380423.0,
    ])
}
method! {
    /// Tsitouras's method, order 5, seven stages (the last is the first of the next step), embedded order 4.
    ///
    /// # Reference
    /// Ch. Tsitouras, *Comput. Math. Appl.* 62 (2011), Table 1; interpolant of order 4 from there.
    Tsit5, 5,
    &[
        &[0.161],
        &[-0.008480655492356989, 0.335480655492357],
        &[2.897_153_057_105_493_5, -6.359448489975075, 4.362295432869581],
        &[5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525],
        &[5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383],
        &[
            0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774,
        ],
    ],
    [
        0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0.0,
    ],
    embedded [
        0.09646076681806523 - 0.001_780_011_052_225_777, 0.01 - 0.0008164344596567469,
        0.4798896504144996 + 0.007880878010261995, 1.379008574103742 - 0.1447110071732629,
        -3.290069515436081 + 0.5823571654525552, 2.324710524099774 - 0.45808210592918697, 1.0 / 66.0
    ],
    interpolant |_: &[f64]| TSIT5
}

/// Tsit5's interpolant, in powers of θ.
const TSIT5: [[f64; 4]; 7] = [
    [1.0, -2.763706197274826, 2.9132554618219126, -1.0530884977290216],
    [0.0, 0.13169999999999998, -0.2234, 0.1017],
    [0.0, 3.9302962368947516, -5.941033872131505, 2.490627285651253],
    [0.0, -12.411077166933676, 30.33818863028232, -16.548102889244902],
    [0.0, 37.50931341651104, -88.1789048947664, 47.37952196281928],
    [0.0, -27.896526289197286, 65.09189467479366, -34.87065786149661],
    [0.0, 1.5, -4.0, 2.5],
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tableau_checks() {
        let fsal = [Bosh3.tableau(), Dopri5.tableau(), Tsit5.tableau()];
        assert!(fsal.iter().all(|tableau| tableau.is_fsal() && !tableau.is_used(tableau.stages() - 1)));
        let plain = [
            Euler.tableau(),
            Midpoint.tableau(),
            Heun.tableau(),
            Ralston.tableau(),
            Rk3.tableau(),
            Rk4.tableau(),
            ThreeEighths.tableau(),
        ];
        assert!(plain.iter().all(|tableau| !tableau.is_fsal()));
        let published = [0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0];
        let nodes = Tsit5.tableau().nodes().iter().zip(published);
        assert!(nodes.into_iter().all(|(sum, c)| (sum - c).abs() < 1e-14));
    }

    #[test]
    fn a_tableau_that_contradicts_itself_is_refused() {
        for (order, rows, b, says) in [
            (2, &[&[0.5][..]][..], &[0.5, 0.6][..], "Σ b ="),
            (3, &[&[0.5][..]][..], &[0.0, 1.0][..], "Σ b c² ="),
            (2, &[&[0.5, 0.1][..]][..], &[0.0, 1.0][..], "needs 1 coefficients"),
            (1, &[][..], &[f64::NAN][..], "holds NaN"),
            (1, &[][..], &[][..], "no stages"),
        ] {
            let error = Tableau::new("mine", order, rows, b).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
