//! Colours: a perceptually even map for densities, and a palette that colour-blind readers can tell apart.

use plotters::style::RGBColor;

/// The map magma at ninths, from its reference implementation in matplotlib.
const MAGMA: [[u8; 3]; 9] = [
    [0x00, 0x00, 0x04],
    [0x1d, 0x11, 0x47],
    [0x51, 0x12, 0x7c],
    [0x83, 0x26, 0x81],
    [0xb7, 0x37, 0x79],
    [0xe6, 0x51, 0x64],
    [0xfb, 0x88, 0x61],
    [0xfe, 0xc3, 0x87],
    [0xfc, 0xfd, 0xbf],
];

/// The colour of a share of the range, 0 dark and 1 light; NaN is dark.
pub fn magma(share: f64) -> RGBColor {
    let share = if share > 0.0 { share.min(1.0) } else { 0.0 };
    let place = share * (MAGMA.len() - 1) as f64;
    let below = (place as usize).min(MAGMA.len() - 2);
    let (low, high) = (MAGMA[below], MAGMA[below + 1]);
    let mix = |channel: usize| {
        let (low, high) = (f64::from(low[channel]), f64::from(high[channel]));
        (low + (high - low) * (place - below as f64)).round() as u8
    };
    RGBColor(mix(0), mix(1), mix(2))
}

/// A colour for the curve of that number, after Okabe and Ito.
pub fn curve(index: usize) -> RGBColor {
    const PALETTE: [RGBColor; 6] = [
        RGBColor(0x00, 0x72, 0xb2),
        RGBColor(0xd5, 0x5e, 0x00),
        RGBColor(0x00, 0x9e, 0x73),
        RGBColor(0xcc, 0x79, 0xa7),
        RGBColor(0xe6, 0x9f, 0x00),
        RGBColor(0x56, 0xb4, 0xe9),
    ];
    PALETTE[index % PALETTE.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_goes_from_dark_to_light_and_clamps() {
        let light = |share| {
            let RGBColor(r, g, b) = magma(share);
            0.2126 * f64::from(r) + 0.7152 * f64::from(g) + 0.0722 * f64::from(b)
        };
        assert!((0..100).all(|i| light(f64::from(i + 1) / 100.0) > light(f64::from(i) / 100.0)));
        assert_eq!((magma(-1.0), magma(f64::NAN)), (magma(0.0), magma(0.0)));
        assert_eq!(magma(7.0), RGBColor(0xfc, 0xfd, 0xbf));
    }
}
