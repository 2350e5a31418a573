//! Codes of rows against what they round, and against their compositions.

use super::*;
use candle_core::Device;

const CODES: [Code; 3] = [Code::Half, Code::Byte, Code::Nibble];

/// Half the distance between neighbouring codes, in units of the largest element of a row.
fn bound(code: Code) -> f64 {
    match code {
        Code::Half => 2f64.powi(-11),
        Code::Byte => 0.5 / 127.0,
        Code::Nibble => 0.5 / 7.0,
    }
}

fn values(x: &Tensor) -> Result<Vec<f64>> {
    x.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

fn there_and_back(code: Code, x: &Tensor) -> Result<(Tensor, bool)> {
    let (codes, scales, finite) = code.encode(x)?;
    let bytes = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
    assert_eq!(bytes(&codes) + bytes(&scales), code.bytes(x.shape()));
    Ok((code.decode(&codes, &scales, x.shape(), x.dtype())?, Finite::read(&[finite])? == [true]))
}

#[test]
fn every_element_is_within_half_a_quantum_of_its_row() -> Result<()> {
    for dtype in [DType::F32, DType::F64] {
        for shape in [&[][..], &[1], &[33], &[5, 1], &[4, 7], &[3, 2, 5], &[2, 3, 4, 5]] {
            let x = Tensor::randn(0f64, 1.0, shape, &Device::Cpu)?;
            let rows = if shape.len() < 2 { 1 } else { shape[0] };
            let sizes = Tensor::from_iter((0..rows).map(|n| 10f64.powi(9 * n as i32 - 9)), &Device::Cpu)?;
            let x = x.reshape((rows, ()))?.broadcast_mul(&sizes.reshape((rows, 1))?)?.reshape(shape)?;
            let x = x.to_dtype(dtype)?;
            for code in CODES {
                let (back, finite) = there_and_back(code, &x)?;
                assert!(finite && back.dims() == x.dims() && back.dtype() == dtype);
                let (x, back) = (values(&x)?, values(&back)?);
                for (x, back) in x.chunks(x.len() / rows).zip(back.chunks(back.len() / rows)) {
                    let largest = x.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
                    for (x, back) in x.iter().zip(back) {
                        assert!((x - back).abs() <= 1.001 * bound(code) * largest, "{code:?}: {x:e} {back:e}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_composition_means_the_same() -> Result<()> {
    for shape in [(1, 1), (3, 4), (2, 7), (5, 64)] {
        let x = Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?;
        for code in CODES {
            let (codes, scales, _) = code.encode(&x)?;
            let (other_codes, other_scales, finite) = code.compose_encode(&x)?;
            assert_eq!(Finite::read(&[finite])?, [true]);
            assert_eq!((codes.dims(), codes.dtype()), (other_codes.dims(), other_codes.dtype()));
            // Candle multiplies by 1 / L: the last digit of a scale may differ, and with it a code at a tie.
            let composed = code.compose_decode(&other_codes, &other_scales, x.shape(), DType::F64)?;
            let back = code.decode(&codes, &scales, x.shape(), DType::F64)?;
            let most = x.abs()?.max_all()?.to_scalar::<f32>()?;
            for (a, b) in values(&back)?.into_iter().zip(values(&composed)?) {
                assert!((a - b).abs() <= 2.01 * bound(code) * f64::from(most), "{code:?}: {a} {b}");
            }
            // The same codes mean the same.
            assert_eq!(values(&back)?, values(&code.compose_decode(&codes, &scales, x.shape(), DType::F64)?)?);
        }
    }
    let zeros = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
    for code in CODES {
        let (codes, scales, _) = code.compose_encode(&zeros)?;
        assert_eq!(values(&code.compose_decode(&codes, &scales, zeros.shape(), DType::F32)?)?, [0.0; 6]);
    }
    Ok(())
}

#[test]
fn zeros_denormals_and_the_largest_numbers_stay_finite() -> Result<()> {
    for code in CODES {
        for largest in [0.0, 1e-45, 3e-44, 2e-40, 1e-38, 1e-30, 1.0, 1e30, 3.4e38] {
            let x = Tensor::new(&[[largest, -largest, 0.0, largest / 3.0], [0f32; 4]], &Device::Cpu)?;
            let (back, finite) = there_and_back(code, &x)?;
            assert!(finite, "{code:?} {largest:e}");
            let (x, back) = (values(&x)?, values(&back)?);
            // A scale that is too small for F32 is off by half of the smallest at most.
            let most = x[0] * bound(code) + code.largest() * 2f64.powi(-150);
            assert!(x.iter().zip(&back).all(|(x, back)| (x - back).abs() <= most * 1.01), "{code:?} {largest:e}");
            assert!(back[4..].iter().all(|x| *x == 0.0));
        }
        // The composition tells no less.
        let x = Tensor::new(&[[1e-45f32, -3e-44], [0.0, 0.0], [2e-45, 0.0]], &Device::Cpu)?;
        let (codes, scales, finite) = code.compose_encode(&x)?;
        assert_eq!(Finite::read(&[finite])?, [true]);
        let composed = values(&code.compose_decode(&codes, &scales, x.shape(), DType::F64)?)?;
        let (back, _) = there_and_back(code, &x)?;
        assert_eq!((&composed, composed.iter().all(|x| *x == 0.0)), (&values(&back)?, false), "{code:?}");
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(!there_and_back(code, &Tensor::new(&[[1.0, bad], [1.0, 1.0]], &Device::Cpu)?)?.1);
        }
        assert!(!there_and_back(code, &Tensor::new(&[1e300_f64], &Device::Cpu)?)?.1, "no F32 scale fits");
    }
    // Halves tell far smaller numbers in F64.
    let x = Tensor::new(&[1e-46f64, -3e-50], &Device::Cpu)?;
    let back = values(&there_and_back(Code::Half, &x)?.0)?;
    assert!((back[0] / 1e-46 - 1.0).abs() < 1e-3 && (back[1] / -3e-50 - 1.0).abs() < 1e-3, "{back:?}");
    Ok(())
}

#[test]
fn rows_without_elements_are_no_trouble() -> Result<()> {
    for code in CODES {
        for shape in [&[0][..], &[3, 0], &[0, 3], &[2, 0, 4]] {
            let (back, finite) = there_and_back(code, &Tensor::zeros(shape, DType::F32, &Device::Cpu)?)?;
            assert!(finite && back.dims() == shape, "{code:?} {shape:?}");
        }
    }
    Ok(())
}
