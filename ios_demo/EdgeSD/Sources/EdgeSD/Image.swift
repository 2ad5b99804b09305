import Foundation

/// Model output [1,3,H,W], about -1..1 -> picture [H,W,3] (edgesd/runtime/image.py). DataError if a value is not finite.
public func toUint8(_ image: Tensor) throws -> NDArray<UInt8> {
    guard image.shape.count == 4, image.shape[1] == 3, image.isFinite else {
        throw dataError("the model drew numbers that are not finite", "finite values",
                        "Use a bundle of higher precision, or other compute units")
    }
    let plane = image.shape[2] * image.shape[3]
    var out = [UInt8](repeating: 0, count: 3 * plane)
    for pixel in 0..<plane {
        for channel in 0..<3 {
            let unit: Float = min(max(image.values[channel * plane + pixel] * 0.5 + 0.5, 0), 1)
            out[3 * pixel + channel] = UInt8((unit * 255).rounded(.toNearestOrEven))
        }
    }
    return NDArray([image.shape[2], image.shape[3], 3], out)
}

/// Predicted latents [1,C,h,w] in the UNet's scale -> rough picture [h,w,3], linear per pixel; screens scale it up.
/// RequestError for a model without `rgb_factors`.
public func preview(_ x0: Tensor, _ latent: LatentSpec) throws -> NDArray<UInt8> {
    guard let factors = latent.rgbFactors, factors.count == 3, factors.allSatisfy({ $0.count == x0.shape[1] }) else {
        throw requestError("a cheap preview", "models with rgb_factors", "Decode the latents instead")
    }
    let plane = x0.shape[2] * x0.shape[3], bias = latent.rgbBias ?? [0, 0, 0]
    var out: [UInt8] = []
    out.reserveCapacity(3 * plane)
    for pixel in 0..<plane {
        for (row, bias) in zip(factors, bias) {
            var sum: Double = bias
            for (channel, factor) in row.enumerated() { sum += factor * Double(x0.values[channel * plane + pixel]) }
            let level: Double = sum.isNaN ? 0 : min(max(sum, 0), 1) * 255
            out.append(UInt8(level.rounded(.toNearestOrEven)))
        }
    }
    return NDArray([x0.shape[2], x0.shape[3], 3], out)
}
